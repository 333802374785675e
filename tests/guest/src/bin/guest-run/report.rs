//! What came out, for people and as JUnit.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::{ExitCode, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result};
use uhmm_guest::records::{Record, TestRecord, parse};

/// The tests that ran and what went wrong beside them.
#[derive(Debug)]
pub struct Report {
    tests: Vec<TestRecord>,
    broken: Vec<String>,
}

/// The kernel panicked, and no suite has said anything, or the emulator has run half of an instruction that the kernel was patching ("Oops: int3"),
/// which no program of ours can bring about.
pub fn emulators_fault(out: &Path) -> Result<bool> {
    let read = |name: &str| fs::read(out.join(name)).with_context(|| format!("Read {name}"));
    let console = read("console.log")?;
    let console = String::from_utf8_lossy(&console);
    let panicked = console.contains("Kernel panic - not syncing");
    Ok(panicked && (read("results.jsonl")?.is_empty() || console.contains("Oops: int3")))
}

impl Report {
    /// Reads the results line. A guest that did not say that it has finished is a failure, however many tests passed.
    pub fn read(out: &Path, ended: Option<ExitStatus>) -> Result<Self> {
        let text = fs::read(out.join("results.jsonl")).context("Read the guest's results")?;
        let records = parse(&String::from_utf8_lossy(&text)).context("The guest's results are damaged")?;
        Ok(Self::of(records, ended))
    }

    fn of(records: Vec<Record>, ended: Option<ExitStatus>) -> Self {
        let mut report = Self { tests: Vec::new(), broken: Vec::new() };
        let mut finished = false;
        for record in records {
            match record {
                Record::Test(test) => report.tests.push(test),
                Record::Broken { why } => report.broken.push(why),
                Record::End => finished = true,
            }
        }
        match ended {
            None => {
                report.broken.push("The guest was killed at its deadline: see console.log, or raise --limit".into())
            }
            Some(status) if !status.success() => {
                report.broken.push(format!("QEMU ended with {status}: see console.log"))
            }
            Some(_) if !finished && report.broken.is_empty() => {
                report.broken.push("The guest ended before its suites did: see console.log".into());
            }
            Some(_) => {}
        }
        if report.tests.is_empty() && report.broken.is_empty() {
            report.broken.push("No test ran: mark tests with #[ignore = \"guest\"]".into());
        }
        report
    }

    fn failed(&self) -> usize {
        self.tests.iter().filter(|test| !test.passed).count() + self.broken.len()
    }

    /// One line a test, the logs of those that failed, the sum.
    pub fn print(&self, out: &Path, time: Duration) -> ExitCode {
        for test in &self.tests {
            let word = if test.passed { "ok    " } else { "FAILED" };
            println!("{word} {:6.2} s  {} {}", test.time_ms as f64 / 1000.0, test.suite, test.name);
            if !test.passed {
                println!("{}", test.log);
            }
        }
        for why in &self.broken {
            println!("BROKEN {why}");
        }
        println!("logs: {}", out.display());
        let failed = self.failed();
        let passed = self.tests.iter().filter(|test| test.passed).count();
        println!("{passed} passed, {failed} failed ({:.1} s in the guest)", time.as_secs_f64());
        if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }

    /// For CI systems.
    pub fn write_junit(&self, path: &Path, time: Duration) -> Result<()> {
        fs::write(path, self.junit(time)?).with_context(|| format!("Write {}", path.display()))
    }

    fn junit(&self, time: Duration) -> Result<String> {
        let (count, failed) = (self.tests.len() + self.broken.len(), self.failed());
        let mut xml = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
        writeln!(xml, r#"<testsuite name="guest" tests="{count}" failures="{failed}" time="{}">"#, time.as_secs_f64())?;
        for test in &self.tests {
            let seconds = test.time_ms as f64 / 1000.0;
            writeln!(xml, r#"<testcase classname="{}" name="{}" time="{seconds}">"#, test.suite, test.name)?;
            if !test.passed {
                writeln!(xml, "<failure/>")?;
            }
            writeln!(xml, "<system-out>{}</system-out></testcase>", escaped(&test.log))?;
        }
        for why in &self.broken {
            writeln!(
                xml,
                r#"<testcase classname="guest" name="harness"><failure>{}</failure></testcase>"#,
                escaped(why)
            )?;
        }
        xml += "</testsuite>\n";
        Ok(xml)
    }
}

/// Text for XML: reserved characters as entities, control characters (which XML cannot say) left out.
fn escaped(text: &str) -> String {
    let printable: String = text.chars().filter(|&c| c == '\n' || c == '\t' || !c.is_control()).collect();
    printable.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    fn test(passed: bool) -> Record {
        let log = "a < b & \u{1b}c".into();
        Record::Test(TestRecord { suite: "s".into(), name: "n".into(), passed, time_ms: 1500, log })
    }

    #[test]
    fn only_a_guest_that_finished_with_passed_tests_is_a_success() {
        let good = Some(ExitStatus::from_raw(0));
        assert_eq!(Report::of(vec![test(true), Record::End], good).failed(), 0);
        assert_eq!(Report::of(vec![test(true), test(false), Record::End], good).failed(), 1);
        assert_eq!(Report::of(vec![Record::End], good).failed(), 1, "nothing ran");
        assert_eq!(Report::of(vec![test(true)], good).failed(), 1, "the guest died");
        assert_eq!(Report::of(vec![test(true), Record::End], None).failed(), 1, "the deadline");
        assert_eq!(Report::of(vec![test(true), Record::Broken { why: "x".into() }], good).failed(), 1);
    }

    #[test]
    fn junit_is_escaped() {
        let report = Report::of(vec![test(false), Record::End], Some(ExitStatus::from_raw(0)));
        let xml = report.junit(Duration::from_secs(2)).unwrap();
        assert!(xml.contains(r#"tests="1" failures="1" time="2""#), "{xml}");
        assert!(xml.contains("a &lt; b &amp; c"), "{xml}");
    }
}
