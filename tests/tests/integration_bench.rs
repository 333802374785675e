//! `uhmm bench` has figures of both sides for everything that it names. How large they are is not tested.

use std::collections::BTreeSet;
use std::process::{Command, Output};

use uhmm_tests::uhmm_exe;

fn bench(args: &[&str]) -> Output {
    Command::new(uhmm_exe()).arg("bench").args(args).output().expect("uhmm bench")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The figures of a run that succeeded.
fn figures(args: &[&str]) -> Vec<serde_json::Value> {
    let output = bench(args);
    assert!(output.status.success(), "{args:?}: {}", said(&output));
    let figures: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let figures = figures.as_array().expect("an array").clone();
    for figure in &figures {
        assert!(figure["case"].is_string() && figure["unit"].is_string(), "{figure}");
        for key in ["value", "floor", "ratio"] {
            let number = figure[key].as_f64();
            assert!(number.is_some_and(|number| number.is_finite() && number > 0.0), "{key}: {figure}");
        }
        assert!(figure["spread"].as_f64().is_some_and(|spread| spread >= 0.0), "{figure}");
    }
    figures
}

#[test]
fn integration_every_bench_measures_uhmm_and_its_floor_in_the_same_run() {
    let folder = tempfile::tempdir().expect("a folder");
    let listed = bench(&["--list"]);
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    let names: BTreeSet<&str> =
        listed.lines().filter_map(|line| line.split(' ').next()).filter(|name| !name.is_empty()).collect();
    assert!(names.contains("fault") && names.contains("scale"), "{listed}");
    let figures = figures(&["--short", "--json", "--plot", &folder.path().display().to_string()]);
    for name in names {
        assert!(figures.iter().any(|figure| figure["bench"] == name), "{name} has no figure");
    }
    let plots = std::fs::read_dir(folder.path()).expect("the plots");
    for plot in plots {
        let text = std::fs::read_to_string(plot.expect("a plot").path()).expect("a plot's text");
        assert!(text.starts_with("<svg") && text.ends_with("</svg>\n") && !text.contains("NaN"), "{text}");
    }
    assert!(folder.path().join("margins.svg").exists() && folder.path().join("fault-free.svg").exists());
}

#[test]
fn integration_what_a_driver_cannot_do_is_said_and_the_rest_is_measured() {
    let output =
        bench(&["fault", "home", "--short", "--json", "--driver", "file", "--only", "shared 4 KiB, program idle"]);
    let said = said(&output);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("Left out: fault") && said.contains("without an aperture"), "{said}");
    let figures: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert!(figures.as_array().expect("an array").iter().any(|figure| figure["bench"] == "home"), "{figures}");
}

#[test]
fn integration_what_cannot_be_measured_is_refused_by_name() {
    for (args, names) in [
        (&["speed"][..], ["\"speed\"", "fault-huge"]),
        (&["fault", "--driver", "edu"], ["\"edu\"", "PCI device"]),
        (&["fault", "--driver", "floppy"], ["\"floppy\"", "nvme"]),
        (&["fault", "--short", "--only", "no such case"], ["Nothing was measured", "no such case"]),
    ] {
        let output = bench(args);
        let said = said(&output);
        assert!(!output.status.success(), "{args:?}: {said}");
        assert!(names.iter().all(|name| said.contains(name)), "{args:?}: {said}");
    }
}
