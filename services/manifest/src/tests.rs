use super::*;

const BASE: &str = r#"
[[service]]
name = "pager"
kind = "pager"
[[service]]
name = "mirror"
kind = "mirror"
"#;

fn with(rest: &str) -> Result<Plan, ManifestError> {
    Manifest::parse(&format!("{BASE}{rest}"))?.resolve()
}

fn driver(name: &str, more: &str) -> String {
    format!(
        "[[service]]\nname = \"{name}\"\nkind = \"driver\"\n{more}\n[[device]]\nname = \"{name}\"\nservice = \"{name}\"\n"
    )
}

fn refused(rest: &str) -> String {
    with(rest).expect_err("the manifest must be refused").to_string()
}

#[test]
fn the_built_in_manifest_resolves_and_survives_the_wire() {
    let plan = Manifest::built_in().resolve().expect("built in");
    assert_eq!(plan.services.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["pager", "mirror", "soft0"]);
    assert_eq!(plan.devices[0].memory_bytes, 1 << 30);
    assert_eq!(Plan::from_toml(&plan.to_toml()), Ok(plan.clone()));
    assert!(plan.print().contains("soft0") && plan.draw().contains("device \"soft0\""));
}

#[test]
fn an_unknown_key_is_refused_by_name_and_line() {
    let text = refused("[supervisor]\nheartbeat = 5\n");
    assert!(text.contains("heartbeat") && text.contains("line 9"), "{text}");
    assert!(refused(&driver("d0", "driver = \"soft\"\ncolour = 1")).contains("colour"));
}

#[test]
fn a_cycle_names_its_members() {
    let text = format!(
        "{}{}",
        driver("a", "driver = \"soft\"\nneeds = [\"b\"]"),
        driver("b", "driver = \"soft\"\nneeds = [\"a\"]")
    );
    assert!(refused(&text).contains("a -> b -> a"));
}

#[test]
fn a_missing_binary_is_named_before_anything_starts() {
    let text = refused(&driver("d0", "command = [\"/nonexistent/driver\", \"-x\"]"));
    assert!(text.contains("/nonexistent/driver") && text.contains("d0"), "{text}");
    assert!(refused(&driver("d0", "command = [\"/etc/passwd\"]")).contains("not executable"));
    assert!(refused(&driver("d0", "command = [\"true\"]")).contains("absolute"));
    let plan = with(&driver("d0", "command = [\"/bin/sh\", \"-c\"]")).expect("an existing program");
    assert!(plan.service("d0").expect("service").external);
}

#[test]
fn dangling_references_are_named() {
    assert!(refused("[[device]]\nname = \"x\"\nservice = \"nobody\"\n").contains("nobody"));
    assert!(refused(&driver("d0", "driver = \"soft\"\nneeds = [\"ghost\"]")).contains("ghost"));
    let text = driver("d0", "driver = \"soft\"") + "[[channel]]\nfrom = \"d0\"\nto = \"ghost\"\n";
    assert!(refused(&text).contains("ghost"));
}

#[test]
fn uphill_channels_are_refused() {
    let text = driver("d0", "driver = \"soft\"") + "[[channel]]\nfrom = \"pager\"\nto = \"mirror\"\n";
    assert!(refused(&text).contains("uphill"));
}

#[test]
fn names_must_fit_socket_paths() {
    for name in ["", "Upper", "a/b", "..", "x y", "supervisor", "0123456789012345678901234567890123"] {
        assert!(refused(&driver(name, "driver = \"soft\"")).contains("not allowed"), "{name}");
    }
    let twice = driver("d0", "driver = \"soft\"") + &driver("d0", "driver = \"soft\"");
    assert!(refused(&twice).contains("twice"));
}

#[test]
fn there_is_exactly_one_pager_and_one_mirror() {
    assert!(refused("[[service]]\nname = \"p2\"\nkind = \"pager\"\n").contains("exactly one"));
    let error = Manifest::parse("[[service]]\nname = \"pager\"\nkind = \"pager\"\n").expect("syntax").resolve();
    assert_eq!(error, Err(ManifestError::Count { kind: "mirror", count: 0 }));
}

#[test]
fn sizes_have_units_and_bounds() {
    let size = |text: &str| with(&(driver("d0", "driver = \"soft\"") + &format!("memory_bytes = {text}\n")));
    assert_eq!(size("\"64MiB\"").expect("suffix").devices[0].memory_bytes, 64 << 20);
    assert_eq!(size("8192").expect("number").devices[0].memory_bytes, 8192);
    for bad in ["0", "4097", "\"1 parsec\"", "\"MiB\"", "\"99999999TiB\"", "-1"] {
        assert!(size(bad).is_err(), "{bad}");
    }
}

#[test]
fn a_driver_needs_one_program_and_one_device() {
    assert!(refused(&driver("d0", "")).contains("needs `driver`"));
    assert!(refused(&driver("d0", "driver = \"warp\"")).contains("soft"));
    assert!(refused(&driver("d0", "driver = \"soft\"\ncommand = [\"/bin/sh\"]")).contains("not both"));
    assert!(refused("[[service]]\nname = \"d0\"\nkind = \"driver\"\ndriver = \"soft\"\n").contains("no device"));
    let two = driver("d0", "driver = \"soft\"") + "[[device]]\nname = \"d1\"\nservice = \"d0\"\n";
    assert!(refused(&two).contains("one service a device"));
}

#[test]
fn a_pci_device_is_named_by_address_or_socket_and_decides_about_its_memory() {
    let plan = |more: &str| with(&(driver("d0", "command = [\"/bin/sh\"]") + more));
    for path in ["0000:00:05.0", "vfio-user:/run/model.sock"] {
        let plan = plan(&format!("pci = \"{path}\"\n")).expect("a PCI device");
        assert_eq!(plan.devices[0].pci.as_ref().map(ToString::to_string).as_deref(), Some(path));
        assert_eq!((plan.devices[0].memory_bytes, plan.devices[0].bar), (MEMORY_BYTES_MAX, None));
        assert_eq!(Plan::from_toml(&plan.to_toml()), Ok(plan.clone()));
        assert!(plan.print().lines().any(|line| line.contains(path) && line.contains(" all ")), "{}", plan.print());
    }
    let limited = plan("pci = \"0000:00:05.0\"\nbar = 2\nmemory_bytes = \"64MiB\"\n").expect("a PCI device");
    assert_eq!((limited.devices[0].memory_bytes, limited.devices[0].bar), (64 << 20, Some(2)));
    assert!(limited.print().contains("<= 64") && limited.print().contains("0000:00:05.0, BAR 2"));
    let formatted = plan("pci = \"0000:00:05.0\"\nformat = true\n").expect("a PCI device");
    assert!(formatted.devices[0].format && !limited.devices[0].format);
    assert!(plan("").expect("without PCI").devices[0].pci.is_none(), "other drivers of third parties need none");
}

#[test]
fn bad_pci_devices_are_refused() {
    let said = |more: &str| refused(&(driver("d0", "command = [\"/bin/sh\"]") + more));
    for path in ["00:05.0", "vfio-user:model.sock", "", "0000:00:05.9"] {
        let text = said(&format!("pci = \"{path}\"\n"));
        assert!(text.contains("names no PCI device") && text.contains("line 15"), "{text}");
    }
    assert!(said("bar = 2\n").contains("`bar` is for PCI devices"));
    assert!(said("format = true\n").contains("`format` is for PCI devices"));
    assert!(said("cmb = true\n").contains("`cmb` is for PCI devices"));
    for (more, why) in [
        ("bar = 6", "0 to 5"),
        ("aperture = false", "remove `aperture`"),
        ("populate = true", "remove `aperture` and `populate`"),
        ("memory_bytes = 0", "multiple of 4096"),
    ] {
        let text = said(&format!("pci = \"0000:00:05.0\"\n{more}\n"));
        assert!(text.contains(why), "{text}");
    }
    let text = refused(&(driver("d0", "driver = \"soft\"") + "pci = \"0000:00:05.0\"\n"));
    assert!(text.contains("\"soft\" drives no PCI device"), "{text}");
    let text = refused(&driver("d0", "driver = \"bar\""));
    assert!(text.contains("say which, as in pci = \"0000:00:05.0\""), "{text}");
}

#[test]
fn nine_devices_are_one_too_many() {
    let text: String = (0..9).map(|i| driver(&format!("d{i}"), "driver = \"soft\"")).collect();
    assert!(refused(&text).contains("at most 8"));
    let text: String = (0..8).map(|i| driver(&format!("d{i}"), "driver = \"soft\"")).collect();
    let ids: Vec<u8> = with(&text).expect("eight").devices.iter().map(|device| device.id).collect();
    assert_eq!(ids, [0, 1, 2, 3, 4, 5, 6, 7]);
}

#[test]
fn numbers_out_of_range_are_named() {
    assert!(refused("[supervisor]\nheartbeat_ms = 1\n").contains("heartbeat_ms"));
    let text = driver("d0", "driver = \"soft\"\nrestart = { backoff_min_ms = 50, backoff_max_ms = 10 }");
    assert!(refused(&text).contains("backoff_min_ms"));
}

#[test]
fn a_coherent_device_needs_an_aperture() {
    let plan = |more: &str| with(&(driver("d0", "driver = \"soft\"") + more));
    assert!(!plan("").expect("plan").devices[0].coherent);
    let coherent = plan("coherent = true\n").expect("plan");
    assert!(
        coherent.devices[0].coherent && Plan::from_toml(&coherent.to_toml()).expect("the wire").devices[0].coherent
    );
    let text = driver("d0", "driver = \"soft\"") + "aperture = false\ncoherent = true\n";
    assert!(refused(&text).contains("aperture = true"));
}

#[test]
fn services_start_after_what_they_need() {
    let text = driver("first", "driver = \"soft\"\nneeds = [\"second\"]") + &driver("second", "driver = \"soft\"");
    let plan = with(&text).expect("plan");
    let names: Vec<&str> = plan.services.iter().map(|service| service.name.as_str()).collect();
    assert_eq!(names, ["pager", "mirror", "second", "first"]);
}

#[test]
fn a_driver_that_joins_is_not_started_and_the_plan_says_what_it_must_prove() {
    let joins = "join = { token_file = \"/etc/uhmm/d0.token\", uid = 1001 }";
    for driver_key in ["", "driver = \"soft\"\n"] {
        let plan = with(&driver("d0", &format!("{driver_key}{joins}"))).expect("it joins");
        assert!(plan.print().contains("joins by token /etc/uhmm/d0.token and uid 1001"), "{}", plan.print());
        assert!(plan.has_joining());
        assert_eq!(Plan::from_toml(&plan.to_toml()), Ok(plan.clone()));
    }
    let plan = with("[holder]\njoin = { uid = 7 }").expect("the holder joins");
    assert!(plan.has_joining() && plan.print().contains("The holder joins by uid 7."), "{}", plan.print());
    assert!(!with("").expect("nobody joins").has_joining());
    let both = format!("command = [\"/bin/sh\"]\n{joins}");
    assert!(refused(&driver("d0", &both)).contains("exclude each other"));
    assert!(refused(&driver("d0", "join = {}")).contains("`token_file`, `uid` or both"));
    assert!(refused(&driver("d0", "join = { token_file = \"x\" }")).contains("absolute"));
    assert!(refused(&driver("d0", "join = { user = 3 }")).contains("user"));
    assert!(refused("[holder]\njoin = {}").contains("\"holder\""));
    let pager = "[[service]]\nname = \"pager\"\nkind = \"pager\"\njoin = { uid = 1 }\n[[service]]\nname = \"m\"\nkind = \"mirror\"";
    let text = Manifest::parse(pager).expect("TOML").resolve().expect_err("refused").to_string();
    assert!(text.contains("beside the supervisor"), "{text}");
}

#[test]
fn a_rule_that_names_nobody_or_nothing_is_refused_by_name() {
    let said =
        |rule: &str| refused(&(driver("d0", "driver = \"soft\"") + "[[client]]\nname = \"mine\"\n" + rule + "\n"));
    for (rule, word) in [
        ("user = \"no-such-user\"", "no-such-user"),
        ("group = \"no-such-group\"", "no-such-group"),
        ("devices = [\"d7\"]", "d7"),
        ("cgroup = \"app\"", "begin it with /"),
        ("container = \"abc\"", "12 letters"),
        ("colour = 1", "colour"),
    ] {
        let text = said(rule);
        assert!(text.contains(word), "{rule}: {text}");
        assert!(text.contains("mine") || word == "colour", "{rule}: {text}");
    }
    let twice = "[[client]]\nname = \"a\"\n[[client]]\nname = \"a\"\n";
    assert!(refused(twice).contains("twice"));
}

#[test]
fn a_client_gets_the_first_rule_that_names_it() {
    let rules = "[[client]]\nname = \"root\"\nuser = 0\n".replace("= 0", "= \"0\"")
        + "[[client]]\nname = \"app\"\ncgroup = \"/system.slice/app\"\ndevices = [\"d0\"]\nmax_spaces = 2\n"
        + "[[client]]\nname = \"box\"\ncontainer = \"0123456789ab\"\ndevice_memory_bytes = \"1MiB\"\ndevices = []\n";
    let plan = with(&(driver("d0", "driver = \"soft\"") + &driver("d1", "driver = \"soft\"") + &rules)).expect("plan");
    let client = |uid: u32, cgroup: &str| Client { uid, gid: uid, cgroups: vec![cgroup.to_owned()] };
    let rule = |client: &Client| plan.rule_of(client).map(|rule| rule.map(|rule| plan.clients[rule].name.as_str()));
    assert_eq!(rule(&client(0, "/")), Ok(Some("root")));
    assert_eq!(rule(&client(7, "/system.slice/app")), Ok(Some("app")));
    assert_eq!(rule(&client(7, "/system.slice/app/worker")), Ok(Some("app")));
    assert!(rule(&client(7, "/system.slice/application")).is_err_and(|text| text.contains("[[client]]")));
    let id = "0123456789abcdef0123";
    for path in [format!("/docker/{id}"), format!("/x/docker-{id}.scope/y"), format!("/cri:libpod-{id}.scope")] {
        assert_eq!(rule(&client(7, &path)), Ok(Some("box")), "{path}");
    }
    assert!(rule(&client(7, "/x0123456789ab")).is_err(), "an id begins where a word does");
    let masks: Vec<u8> = plan.clients.iter().map(|rule| rule.device_mask).collect();
    assert_eq!(masks, [255, 1, 0]);
    assert!(plan.rules_ask_for_groups());
    assert_eq!(Plan::from_toml(&plan.to_toml()), Ok(plan.clone()));
    let shown = plan.print();
    assert!(shown.contains("cgroup /system.slice/app") && shown.contains("Any other client is refused"), "{shown}");
    assert_eq!(with("").expect("plan").rule_of(&client(7, "/")), Ok(None), "without rules nobody is refused");
}

#[test]
fn a_service_runs_as_a_user_that_exists() {
    let user = |user: &str| with(&driver("d0", &format!("driver = \"soft\"\nuser = \"{user}\"")));
    let plan = user("nobody").expect("every Debian has it");
    let account = plan.service("d0").and_then(|service| service.account.clone()).expect("an account");
    assert_eq!((account.user.as_str(), account.uid), ("nobody", 65_534));
    assert_eq!(Plan::from_toml(&plan.to_toml()), Ok(plan.clone()));
    assert!(plan.print().contains("d0 runs as nobody (65534:65534)"));
    let error = user("no-such-user").expect_err("refused").to_string();
    assert!(error.contains("\"d0\"") && error.contains("no-such-user") && error.contains("/etc/passwd"), "{error}");
    assert!(user("root").is_err());
}

#[test]
fn a_service_without_sandbox_is_shown_as_such() {
    let plan = with(&driver("d0", "driver = \"soft\"\nsandbox = { mode = \"off\" }")).expect("plan");
    assert!(plan.print().contains("d0 is NOT confined"), "{}", plan.print());
    assert_eq!(Plan::from_toml(&plan.to_toml()), Ok(plan.clone()));
    assert!(refused(&driver("d0", "driver = \"soft\"\nsandbox = { mode = \"weak\" }")).contains("weak"));
    assert!(!with(&driver("d0", "driver = \"soft\"")).expect("plan").print().contains("NOT confined"));
}
