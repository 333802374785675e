//! The DRA driver between a kubelet and an API server that the tests play, with a real uhmm below and real programs that are held to their shares.

use std::collections::BTreeMap;
use std::io::BufRead;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use serde_json::{Value, json};
use uhmm_sdk::Session;
use uhmm_tests::{manifest_of, uhmm_exe};

use api::ApiServer;
use bed::{Node, ONLY_CLAIMS, ROLE};
use kubelet::claim;

mod api;
mod bed;
mod killed;
mod kubelet;
#[path = "../../src/wire.rs"]
mod wire;

const MIB: u64 = 1 << 20;
/// Pages of a MiB.
const PAGES: u64 = MIB / 4096;

/// Not a test of its own: a pod's program, where the environment says so.
#[test]
fn integration_dra_pod_role() {
    if std::env::var_os(ROLE).is_none() {
        return;
    }
    let session = Session::connect(None);
    let mut regions = Vec::new();
    for line in std::io::stdin().lock().lines() {
        let line = line.expect("text");
        let session = match &session {
            Ok(session) => session,
            Err(error) => return println!("refused {error}"),
        };
        let words: Vec<&str> = line.split(' ').collect();
        let ["migrate", device, mib] = words.as_slice() else { break };
        let bytes = mib.parse::<u64>().expect("a number") * MIB;
        let region = session.allocate(bytes).expect("memory");
        (0..bytes / 4096).for_each(|page| region.write_u64(page * 4096, page ^ bytes).expect("write"));
        let moved = session.device(device).and_then(|device| session.migrate(region.addr(), bytes, &device));
        match moved {
            Ok(report) => println!("moved {} {}", report.moved_pages, report.why),
            Err(error) => println!("refused {error}"),
        }
        regions.push(region);
    }
    for region in &regions {
        let bytes = region.len_bytes();
        (0..bytes / 4096).for_each(|page| assert_eq!(region.read_u64(page * 4096).expect("read"), page ^ bytes));
    }
    println!("ok");
}

#[test]
fn integration_dra_a_pod_has_its_share_and_no_more_and_nobody_pays_for_it() {
    let node = Node::start(ONLY_CLAIMS);
    let info = node.kubelet.register();
    assert_eq!((info.r#type.as_str(), info.name.as_str()), ("DRAPlugin", "uhmm.internal"));
    assert_eq!(info.supported_versions, ["v1.DRAPlugin", "v1beta1.DRAPlugin"]);
    assert_eq!(Path::new(&info.endpoint), node.kubelet.dir.join("plugins/uhmm.internal/dra.sock"));

    node.api.allocate("small", &[("soft0", "8Mi")]);
    node.api.allocate("large", &[("soft0", "24Mi"), ("soft1", "4Mi")]);
    let small = node.kubelet.prepared("small");
    let device = &small.devices[0];
    assert_eq!((device.pool_name.as_str(), device.device_name.as_str()), (api::NODE, "soft0"));
    assert_eq!(
        (&device.request_names, &device.cdi_device_ids),
        (&vec!["r0".to_owned()], &vec!["uhmm.internal/claim=claim-uid-small-0".to_owned()])
    );
    let mut beta = node.kubelet.clone();
    beta.version = "v1beta1";
    let large = beta.prepared("large");
    assert_eq!(large.devices.len(), 2);

    let (mut one, mut other) = (node.pod("one", &small), node.pod("other", &large));
    assert_eq!(other.migrate("soft0", 24), (24 * PAGES, String::new()), "it has all of its share");
    let (moved, why) = one.migrate("soft0", 12);
    assert_eq!(moved, 8 * PAGES, "{why}");
    assert!(why.contains("default/small") && why.contains("8388608 bytes of soft0"), "{why}");
    // A second process of the pod finds the share used up, and what the other claim has of soft1 is no help on soft0.
    let mut second = node.pod("second", &small);
    assert_eq!(second.migrate("soft0", 2).0, 0);
    assert!(second.say("migrate soft1 2").contains("gives nothing of device soft1"));
    assert_eq!(other.migrate("soft0", 2).0, 0);
    assert_eq!(other.migrate("soft1", 6).0, 4 * PAGES);
    let status =
        Command::new(uhmm_exe()).arg("--run-dir").arg(node.uhmm.run_dir()).arg("status").output().expect("it runs");
    let status = String::from_utf8_lossy(&status.stdout).into_owned();
    let line = status.lines().find(|line| line.starts_with("dra/uid-large")).unwrap_or_else(|| panic!("{status}"));
    assert!(line.contains("default/large") && line.ends_with("1  soft0 24/24, soft1 4/4"), "{line}");
    // So it is for the next pager.
    let killed = node.uhmm.kill("pager");
    node.uhmm.wait_ready("pager", killed);
    assert_eq!((one.migrate("soft0", 2).0, second.migrate("soft0", 2).0), (0, 0));
    // Nobody else gets anything.
    let mut none = node.stranger("none", &[]);
    assert!(none.say("migrate soft0 2").contains("no-claim"));
    let mut wrong = node.stranger("wrong", &[("UHMM_CLAIM", &"ab".repeat(32))]);
    assert!(wrong.say("hello").contains("UHMM_CLAIM"));

    // Taken back while its programs run: they keep what they have, bytes and all, and get no more.
    assert_eq!(node.kubelet.unprepare("small").expect("an answer"), "");
    assert!(one.say("migrate soft0 1").contains("taken back"));
    for pod in [&mut one, &mut other, &mut second] {
        assert_eq!(pod.say("end"), "ok");
    }
    assert_eq!(node.core_claims(), [("dra/uid-large".to_owned(), vec![24 * MIB, 4 * MIB])]);
    assert_eq!(node.cdi_files().len(), 1);
}

#[test]
fn integration_dra_one_bad_claim_costs_the_others_nothing() {
    let node = Node::start(ONLY_CLAIMS);
    let result = |change: fn(&mut Value)| {
        let mut result = json!({
            "request": "r", "driver": "uhmm.internal", "pool": api::NODE, "device": "soft0", "consumedCapacity": { "memory": "2Mi" },
        });
        change(&mut result);
        json!([result])
    };
    node.api.allocate("good", &[("soft0", "4Mi")]);
    node.api.allocate("good-2", &[("soft1", "4Mi")]);
    node.api.allocate("too-much", &[("soft0", "30Mi")]);
    node.api.allocate("no-device", &[("soft7", "2Mi")]);
    node.api.put_claim("malformed", result(|result| result["consumedCapacity"] = json!({ "memory": "2 Mi" })));
    node.api
        .put_claim("no-gate", result(|result| drop(result.as_object_mut().expect("one").remove("consumedCapacity"))));
    node.api.put_claim("elsewhere", result(|result| result["pool"] = "node-2".into()));
    node.api.put_claim("not-allocated", Value::Null);
    node.api.put_claim("again", result(|_| {}));
    node.api.change(|state| state.claims.get_mut("default/again").expect("it")["metadata"]["uid"] = "new".into());
    let wrong = [
        ("too-much", "30Mi of device soft0 are asked for, and 28Mi are left"),
        ("no-device", "soft7"),
        ("malformed", "\"2 Mi\""),
        ("no-gate", "DRAConsumableCapacity"),
        ("elsewhere", "node-2"),
        ("not-allocated", "not allocated"),
        ("again", "made again"),
        ("unknown", "deleted"),
        ("../../../api/v1/secrets", "no name"),
    ];
    let names = ["good"].iter().chain(wrong.iter().map(|(name, _)| name)).chain(&["good-2"]);
    let asked = names.map(|name| claim(name)).collect();
    let answer: wire::PrepareResponse = node.kubelet.ask("NodePrepareResources", asked).expect("an answer");
    assert_eq!(answer.claims.len(), wrong.len() + 2);
    for (name, text) in wrong {
        let one = &answer.claims[&claim(name).uid];
        assert!(one.error.contains(text) && one.devices.is_empty(), "{name}: {one:?}");
    }
    for name in ["good", "good-2"] {
        assert_eq!(
            (answer.claims[&claim(name).uid].error.as_str(), answer.claims[&claim(name).uid].devices.len()),
            ("", 1)
        );
    }
    assert_eq!(node.core_claims().len(), 2, "nothing of the others is left anywhere");
    assert_eq!(node.cdi_files().len(), 2);

    // Prepared twice: the same. Unknown: taken back already. A claim that was never there: the same.
    let files = |node: &Node| -> BTreeMap<_, _> {
        node.cdi_files().into_iter().map(|file| (file.clone(), std::fs::read(file).expect("it"))).collect()
    };
    let before = files(&node);
    assert_eq!(node.kubelet.prepared("good"), answer.claims[&claim("good").uid]);
    assert_eq!(files(&node), before);
    for name in ["too-much", "never-seen"] {
        assert_eq!(node.kubelet.unprepare(name).expect("an answer"), "");
    }
}

#[test]
fn integration_dra_api_server_and_core_may_be_away() {
    let mut node = Node::start(ONLY_CLAIMS);
    node.api.allocate("good", &[("soft0", "4Mi")]);
    node.api.allocate("good-2", &[("soft1", "4Mi")]);
    node.api.allocate("other", &[("soft0", "2Mi")]);
    node.kubelet.prepared("good");
    node.kubelet.prepared("good-2");
    // The API server is away: what was prepared is answered all the same, and nothing else.
    node.api.change(|state| state.away = true);
    node.kubelet.prepared("good");
    assert!(node.kubelet.refused("other").contains("503"));
    assert_eq!(node.kubelet.unprepare("good-2").expect("an answer"), "");
    node.api.change(|state| state.away = false);

    // The core does not run: nothing can be given, but pods may end. The next core has what is left.
    node.uhmm.stop();
    assert!(node.kubelet.refused("good-2").contains("uhmm up"));
    assert_eq!(node.kubelet.unprepare("good").expect("an answer"), "");
    node.api.allocate("third", &[("soft0", "6Mi")]);
    node.uhmm.start_again(&format!("{}\n{ONLY_CLAIMS}", manifest_of(2, "32MiB", "")));
    let third = node.kubelet.prepared("third");
    assert_eq!(node.core_claims(), [("dra/uid-third".to_owned(), vec![6 * MIB])]);
    assert_eq!(node.pod("pod", &third).migrate("soft0", 6).0, 6 * PAGES);
    // A cold start of the core takes the rule with it; the driver gives it again.
    node.uhmm.stop();
    node.uhmm.start_again(&format!("{}\n{ONLY_CLAIMS}", manifest_of(2, "32MiB", "")));
    node.wait_core(&["dra/uid-third"]);
    assert_eq!(node.pod("pod-2", &third).migrate("soft0", 8).0, 6 * PAGES);
}

#[test]
fn integration_dra_slices_say_what_there_is() {
    let stray =
        json!({ "metadata": { "name": "old", "resourceVersion": "9" }, "spec": { "pool": { "generation": 41 } } });
    let api = ApiServer::start();
    api.change(|state| drop(state.slices.insert("old".to_owned(), stray)));
    let server = format!("http://127.0.0.1:{}", api.port());
    let mut node = Node::start_with("", api, server);
    let offered = |state: &api::State| if state.slices.len() == 1 { ApiServer::offered(state) } else { None };
    let (devices, generation) = node
        .api
        .wait("a slice instead of the old one", |state| offered(state).filter(|(devices, _)| devices.len() == 2));
    assert!(generation > 41);
    assert_eq!(
        devices["soft0"],
        json!({
            "name": "soft0", "allowMultipleAllocations": true, "attributes": { "uhmm.internal/name": { "string": "soft0" } },
            "capacity": { "memory": {
                "value": "32Mi", "requestPolicy": { "default": "2Mi", "validRange": { "min": "2Mi", "step": "2Mi" } },
            } },
        })
    );
    let slice = node.api.state().slices.values().next().expect("it").clone();
    assert_eq!(
        (&slice["spec"]["nodeName"], &slice["spec"]["pool"]["name"], &slice["spec"]["pool"]["resourceSliceCount"]),
        (&json!(api::NODE), &json!(api::NODE), &json!(1))
    );
    assert_eq!(slice["metadata"]["ownerReferences"][0]["uid"], "node-uid");
    valid(&slice, node.dir.path());
    node.wait_log("no [[client]] rules");

    // Somebody who has no claim uses some of it (there are no rules here), and somebody who has one does: that the scheduler knows already.
    node.api.allocate("far", &[("soft0", "8Mi")]);
    let prepared = node.kubelet.prepared("far");
    assert_eq!(node.pod("pod", &prepared).migrate("soft0", 8).0, 8 * PAGES);
    let mut stranger = node.stranger("stranger", &[]);
    assert_eq!(stranger.migrate("soft0", 10).0, 10 * PAGES);
    node.api.change(|state| state.conflicts = 1);
    let value = |devices: &BTreeMap<String, Value>| devices["soft0"]["capacity"]["memory"]["value"].clone();
    node.api.wait("less is offered", |state| offered(state).filter(|(devices, _)| value(devices) == "22Mi"));
    node.api.allocate("more", &[("soft0", "16Mi")]);
    assert!(node.kubelet.refused("more").contains("14Mi are left"));
    // A device that is drained is offered no more, and comes back.
    let id = node.uhmm.operator().device_id("soft1").expect("soft1");
    node.uhmm.operator().drain(id).expect("drained");
    node.api.wait("soft1 is withdrawn", |state| offered(state).filter(|(devices, _)| !devices.contains_key("soft1")));
    node.api.allocate("drained", &[("soft1", "2Mi")]);
    assert!(node.kubelet.refused("drained").contains("drained"));
    node.uhmm.operator().undrain(id).expect("undrained");
    node.api.wait("soft1 is back", |state| offered(state).filter(|(devices, _)| devices.contains_key("soft1")));
    // A driver that starts again goes on with the generation; one that stops in order leaves no socket for the kubelet to find.
    let (_, before) = offered(&node.api.state()).expect("a slice");
    node.stop_driver();
    assert_eq!(std::fs::read_dir(node.kubelet.dir.join("plugins_registry")).expect("the folder").count(), 0);
    let requests = node.api.state().log.len();
    node.start_driver();
    node.api.wait("it looks twice", |state| (state.log.len() > requests + 1).then_some(()));
    assert_eq!(offered(&node.api.state()).expect("a slice").1, before, "nothing has changed");
    node.kubelet.register();
    // Without uhmm there is nothing to offer.
    node.uhmm.stop();
    node.api.wait("the slice is gone", |state| state.slices.is_empty().then_some(()));
}

/// Against the schema of the API (the same program that validates our manifests).
fn valid(object: &Value, dir: &Path) {
    let path = dir.join("object.yaml");
    std::fs::write(&path, object.to_string()).expect("a file");
    let output = Command::new("kubernetes-validate").arg("--strict").arg(&path).output();
    let output = output.expect("pip install kubernetes-validate (its schemas come with it)");
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("passed"), "{said}");
}

#[test]
fn integration_dra_the_api_server_is_asked_over_tls_and_must_be_the_right_one() {
    let certificates = tempfile::tempdir().expect("a folder");
    let (ours, other) = (tls::certificate(certificates.path(), "ours"), tls::certificate(certificates.path(), "other"));
    let api = ApiServer::start_with(tls::wrap(&ours));
    api.allocate("far", &[("soft0", "2Mi")]);
    let server = format!("https://localhost:{}", api.port());
    let node = Node::start_with(ONLY_CLAIMS, api, server);
    // Without authority, then with another's.
    assert!(node.kubelet.refused("far").contains("ca.crt"));
    std::fs::copy(&other.certificate, node.dir.path().join("ca.crt")).expect("copied");
    assert!(node.kubelet.refused("far").contains("does not answer"));
    assert!(node.api.state().log.is_empty(), "it was shown nothing");
    std::fs::copy(&ours.certificate, node.dir.path().join("ca.crt")).expect("copied");
    node.kubelet.prepared("far");
}

#[test]
fn integration_dra_what_cannot_work_says_so_at_once() {
    let mut node = Node::start(ONLY_CLAIMS);
    node.api.allocate("far", &[("soft0", "2Mi")]);
    node.kubelet.prepared("far");
    let refused = |command: &mut Command| {
        let output = command.output().expect("it runs");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains("Error: "), "{text}");
        text
    };
    assert!(refused(&mut node.command()).contains("Another uhmm dra"));
    assert!(node.command().arg("--probe").output().expect("it runs").status.success());
    node.kill_driver();
    assert!(refused(node.command().arg("--probe")).contains("Nobody answers"));
    let checkpoint = node.kubelet.dir.join("plugins/uhmm.internal/claims");
    let whole = std::fs::read_to_string(&checkpoint).expect("the checkpoint");
    let damaged = whole.replace("2097152", "2097153");
    std::fs::write(&checkpoint, &damaged).expect("damage");
    assert!(refused(&mut node.command()).contains("damaged"));
    assert_eq!(std::fs::read_to_string(&checkpoint).expect("it"), damaged, "left alone");
    assert!(refused(node.command().args(["--driver-name", "No Name"])).contains("--driver-name"));
    let mut nowhere = Command::new(uhmm_exe());
    nowhere.args(["dra", "--node-name", "n", "--kubelet-dir", "/nonexistent/x"]);
    assert!(refused(&mut nowhere).contains("/nonexistent/x") && !Path::new("/nonexistent").exists());
    std::fs::write(&checkpoint, &whole).expect("mended");
    node.start_driver();
    node.kubelet.prepared("far");
    assert_eq!(node.core_claims().len(), 1);
}

/// TLS around the API server.
mod tls {
    use super::*;
    use std::path::PathBuf;

    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    use rustls::{ServerConfig, ServerConnection, StreamOwned};

    pub struct Certificate {
        pub certificate: PathBuf,
        key: PathBuf,
    }

    /// One that signs itself, of localhost.
    pub fn certificate(folder: &Path, name: &str) -> Certificate {
        let (certificate, key) = (folder.join(format!("{name}.crt")), folder.join(format!("{name}.key")));
        let config = folder.join("config");
        let text = "[req]\ndistinguished_name = dn\nprompt = no\nx509_extensions = v3\n[dn]\nCN = localhost\n[v3]\nsubjectAltName = DNS:localhost\n";
        std::fs::write(&config, text).expect("a file");
        let mut command = Command::new("openssl");
        command.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]);
        command.arg("-config").arg(&config);
        let output = command.arg("-keyout").arg(&key).arg("-out").arg(&certificate).output();
        let output = output.expect("apt-get install -y openssl");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Certificate { certificate, key }
    }

    pub fn wrap(certificate: &Certificate) -> api::Wrap {
        let chain = vec![CertificateDer::from_pem_file(&certificate.certificate).expect("a certificate")];
        let key = PrivateKeyDer::from_pem_file(&certificate.key).expect("a key");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config =
            ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().expect("versions");
        let config = Arc::new(config.with_no_client_auth().with_single_cert(chain, key).expect("a pair"));
        Arc::new(move |stream| {
            let connection = ServerConnection::new(config.clone()).expect("a connection");
            Box::new(StreamOwned::new(connection, stream))
        })
    }
}
