//! Results: one line a case for people, one object for machines.

use serde::Serialize;

/// How a case ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Every assertion held, every byte was right, nothing was left behind.
    Passed,
    /// See `why`.
    Failed,
    /// The case means nothing here; `why` says for what reason.
    NotApplicable,
}

impl Status {
    fn words(self) -> &'static str {
        match self {
            Status::Passed => "passed",
            Status::Failed => "FAILED",
            Status::NotApplicable => "not applicable",
        }
    }
}

/// One case.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CaseReport {
    /// Name.
    pub name: String,
    /// How it ended.
    pub status: Status,
    /// What was wrong, or why it does not apply; a passed case may say what it has measured.
    pub why: String,
    /// Wall time in milliseconds.
    pub time_ms: u64,
}

impl CaseReport {
    /// A line of the table.
    pub fn line(&self) -> String {
        format!(
            "{:<50} {:<14} {:>7} ms  {}",
            self.name,
            self.status.words(),
            self.time_ms,
            self.why.replace('\n', " | ")
        )
        .trim_end()
        .to_owned()
    }
}

/// The whole run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// How many passed.
    pub passed: u64,
    /// How many failed.
    pub failed: u64,
    /// How many do not apply.
    pub not_applicable: u64,
    /// Each of them, in order.
    pub cases: Vec<CaseReport>,
}

impl Report {
    pub(crate) fn add(&mut self, case: CaseReport) {
        match case.status {
            Status::Passed => self.passed += 1,
            Status::Failed => self.failed += 1,
            Status::NotApplicable => self.not_applicable += 1,
        }
        self.cases.push(case);
    }

    /// The table's last line.
    pub fn totals(&self) -> String {
        let time_ms: u64 = self.cases.iter().map(|case| case.time_ms).sum();
        format!(
            "{} cases: {} passed, {} failed, {} not applicable, {}.{:03} s",
            self.cases.len(),
            self.passed,
            self.failed,
            self.not_applicable,
            time_ms / 1000,
            time_ms % 1000
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case(name: &str, status: Status, why: &str) -> CaseReport {
        CaseReport { name: name.into(), status, why: why.into(), time_ms: 1500 }
    }

    #[test]
    fn json_has_exactly_the_agreed_keys() {
        let mut report = Report::default();
        report.add(case("T01_open_close", Status::Passed, ""));
        report.add(case("T21_mixedmap", Status::NotApplicable, "no mixed maps"));
        assert_eq!(
            serde_json::to_string(&report).unwrap(),
            r#"{"passed":1,"failed":0,"not_applicable":1,"cases":[{"name":"T01_open_close","status":"passed","why":"","time_ms":1500},{"name":"T21_mixedmap","status":"not_applicable","why":"no mixed maps","time_ms":1500}]}"#
        );
    }

    #[test]
    fn totals_count_every_case_once() {
        let mut report = Report::default();
        for status in [Status::Passed, Status::Failed, Status::NotApplicable, Status::Passed] {
            report.add(case("x", status, ""));
        }
        assert_eq!(report.totals(), "4 cases: 2 passed, 1 failed, 1 not applicable, 6.000 s");
        assert!(report.cases[1].line().contains("FAILED"));
    }
}
