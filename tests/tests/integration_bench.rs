//! `uhmm bench` has figures of both sides. How large they are is not tested.

use std::process::Command;

use uhmm_tests::uhmm_exe;

#[test]
fn integration_a_bench_measures_uhmm_and_the_floor_in_the_same_run() {
    for case in ["clients 8", "regions 100"] {
        let mut command = Command::new(uhmm_exe());
        command.args(["bench", "scale", "--rounds", "1", "--json", "--only", case]);
        let output = command.output().expect("uhmm bench");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        let figures: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let figures = figures.as_array().expect("an array");
        assert_eq!(figures.len(), 1, "{figures:?}");
        assert_eq!((figures[0]["bench"].as_str(), figures[0]["case"].as_str()), (Some("scale"), Some(case)));
        assert!(figures[0]["unit"].is_string());
        for key in ["value", "floor", "ratio"] {
            assert!(figures[0][key].as_f64().is_some_and(|figure| figure > 0.0), "{key}: {figures:?}");
        }
        assert_eq!(figures[0]["spread"].as_f64(), Some(0.0), "one round differs from no other");
    }
}

#[test]
fn integration_a_bench_that_does_not_exist_is_refused_by_name() {
    let output = Command::new(uhmm_exe()).args(["bench", "speed"]).output().expect("uhmm bench");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("\"speed\"") && said.contains("scale"), "{said}");
}
