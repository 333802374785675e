//! What the guest says to the host: one JSON object a line. The last one is `End`; without it the guest did not finish.

use serde::{Deserialize, Serialize};

/// One line of the results.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "record")]
pub enum Record {
    /// A test ended.
    Test(TestRecord),
    /// The guest could not be set up or a suite could not be listed.
    Broken {
        /// What failed, with its causes.
        why: String,
    },
    /// Everything that was to run has run.
    End,
}

/// How a test ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TestRecord {
    /// The file in `tests/guest/tests`, without its ending.
    pub suite: String,
    /// The test's function.
    pub name: String,
    /// It passed.
    pub passed: bool,
    /// Time in the guest, in milliseconds.
    pub time_ms: u64,
    /// All it printed, cut in the middle if it was very long.
    pub log: String,
}

/// Reads what came. A last line that was cut (the guest was killed) is left out; a bad line in the middle is an error.
///
/// # Errors
/// The line that is no record.
pub fn parse(text: &str) -> Result<Vec<Record>, serde_json::Error> {
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().map(str::trim).filter(|line| !line.is_empty()).map(serde_json::from_str).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_over_a_terminal_and_a_cut_line_is_left_out() {
        let test = TestRecord { suite: "s".into(), name: "n".into(), passed: true, time_ms: 7, log: "a\nb".into() };
        let records = [Record::Test(test), Record::Broken { why: "x".into() }, Record::End];
        let mut text = String::new();
        for record in &records {
            text += &format!("{}\r\n", serde_json::to_string(record).unwrap());
        }
        assert_eq!(parse(&text).unwrap(), records);
        text.truncate(text.len() - 6);
        assert_eq!(parse(&text).unwrap(), records[..2]);
        assert!(parse("nonsense\n").is_err());
    }
}
