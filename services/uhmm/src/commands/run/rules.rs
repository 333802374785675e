//! `--policy FILE`: which policy chooses what leaves, with its numbers, and which mappings are left alone. docs/run.md, "Policy files", has every key.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use serde::Deserialize;
use uhmm_manifest::ByteSize;

use super::adverse::{Adversary, Adverse};
use super::policy::{Aged, Clock, LAPS_MAX, Policy};

/// So long nobody touches what leaves.
const REST_MS: u64 = 50;
const REST_MAX_MS: u64 = 1000;
const MIN_AGE_MS: u64 = 100;

/// A file as it is written.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
pub struct Rules {
    policy: Name,
    rest_ms: u64,
    min_age_ms: u64,
    laps_max: u8,
    leave_alone: Vec<Rule>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Name {
    #[default]
    Aged,
    Clock,
    Random,
    Always,
    Never,
    Nonsense,
}

/// A mapping that all of it applies to is left alone.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
struct Rule {
    name: Option<String>,
    smaller_than: Option<ByteSize>,
    larger_than: Option<ByteSize>,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            policy: Name::default(),
            rest_ms: REST_MS,
            min_age_ms: MIN_AGE_MS,
            laps_max: LAPS_MAX,
            leave_alone: Vec::new(),
        }
    }
}

impl Rules {
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("{} cannot be read", path.display()))?;
        Self::parse(&text)
            .map_err(|why| anyhow::anyhow!("{}, {why}. docs/run.md, \"Policy files\", has every key", path.display()))
    }

    fn parse(text: &str) -> Result<Self, String> {
        let rules: Self = toml::from_str(text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start);
            format!("{}: {}", line_at(text, at), error.message().replace('\n', ", "))
        })?;
        rules.check().map_err(|(key, why)| {
            let at = text.lines().position(|line| line.trim_start().starts_with(key)).unwrap_or(0);
            format!("line {}: {why}", at + 1)
        })?;
        Ok(rules)
    }

    /// The key whose value cannot be meant, and why.
    fn check(&self) -> Result<(), (&'static str, String)> {
        if self.rest_ms > REST_MAX_MS {
            return Err(("rest_ms", format!("rest_ms = {} is too long: give 0 to {REST_MAX_MS}", self.rest_ms)));
        }
        if self.laps_max == 0 {
            return Err(("laps_max", "laps_max = 0 leaves nothing alone: give 1 to 255".into()));
        }
        if self.leave_alone.contains(&Rule::default()) {
            let why = "a rule without name, smaller_than and larger_than leaves everything alone: say which mappings";
            return Err(("[[leave_alone]]", why.into()));
        }
        Ok(())
    }

    pub fn policy(&self) -> Box<dyn Policy> {
        let ms = Duration::from_millis;
        match self.policy {
            Name::Aged => Box::new(Aged::new(ms(self.rest_ms), ms(self.min_age_ms), self.laps_max)),
            Name::Clock => Box::new(Clock::new(self.laps_max)),
            Name::Random => Box::new(Adversary::new(Adverse::Random)),
            Name::Always => Box::new(Adversary::new(Adverse::Always)),
            Name::Never => Box::new(Adversary::new(Adverse::Never)),
            Name::Nonsense => Box::new(Adversary::new(Adverse::Nonsense)),
        }
    }

    pub fn left_alone(&self) -> LeftAlone {
        LeftAlone(self.leave_alone.clone())
    }
}

fn line_at(text: &str, offset: usize) -> String {
    let before = text.get(..offset).unwrap_or(text);
    format!("line {}", before.matches('\n').count() + 1)
}

/// What of a mapping rules are about.
#[derive(Clone, Copy, Debug)]
pub struct Mapping<'a> {
    /// As `/proc/PID/maps` has it.
    pub name: &'a str,
    pub len_bytes: u64,
}

/// Mappings that stay in memory.
#[derive(Clone, Debug, Default)]
pub struct LeftAlone(Vec<Rule>);

impl LeftAlone {
    /// Whether names are needed at all: the kernel makes them one by one.
    pub fn has_names(&self) -> bool {
        self.0.iter().any(|rule| rule.name.is_some())
    }

    pub fn has(&self, mapping: &Mapping<'_>) -> bool {
        self.0.iter().any(|rule| rule.applies(mapping))
    }
}

impl Rule {
    fn applies(&self, mapping: &Mapping<'_>) -> bool {
        let name = self.name.as_ref().is_none_or(|name| match name.strip_suffix('*') {
            Some(begin) => mapping.name.starts_with(begin),
            None => mapping.name == name,
        });
        name && self.smaller_than.is_none_or(|size| mapping.len_bytes < size.0)
            && self.larger_than.is_none_or(|size| mapping.len_bytes > size.0)
    }
}

/// Names of a process's mappings, by first address.
pub fn names(pid: u32) -> anyhow::Result<Vec<(u64, String)>> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let named = |line: &str| {
        let start = u64::from_str_radix(line.split('-').next()?, 16).ok()?;
        // Range, rights, offset, device, inode; the name may have spaces.
        let mut rest = line;
        for _ in 0..5 {
            rest = rest.trim_start().split_once(char::is_whitespace).map_or("", |(_, rest)| rest);
        }
        Some((start, rest.trim().to_owned()))
    };
    let names: Vec<_> = maps.lines().filter_map(named).collect();
    if names.is_empty() {
        bail!("It has no mappings: it has ended");
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_is_what_holds_without_one() {
        assert_eq!(Rules::parse("").unwrap(), Rules::default());
    }

    #[test]
    fn every_key_is_read() {
        let text = "policy = \"clock\"\nrest_ms = 7\nmin_age_ms = 8\nlaps_max = 9\n\
                    [[leave_alone]]\nname = \"[heap]\"\n\
                    [[leave_alone]]\nsmaller_than = \"1MiB\"\nname = \"[anon:*\"\nlarger_than = 4096\n";
        let rules = Rules::parse(text).unwrap();
        assert_eq!((rules.policy, rules.rest_ms, rules.min_age_ms, rules.laps_max), (Name::Clock, 7, 8, 9));
        let left = rules.left_alone();
        let has = |name, len_bytes| left.has(&Mapping { name, len_bytes });
        assert!(left.has_names() && has("[heap]", 1 << 40) && !has("", 1 << 19) && !has("[heap", 1 << 19));
        assert!(has("[anon:x]", 8192) && !has("[anon:x]", 4096) && !has("[anon:x]", 1 << 20));
        assert!(!Rules::default().left_alone().has(&Mapping { name: "", len_bytes: 4096 }));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (text, line, word) in [
            ("policy = \"best\"", "line 1", "clock"),
            ("rest_ms = 5\nrest = 5", "line 2", "min_age_ms"),
            ("\n\nrest_ms = 2000", "line 3", "1000"),
            ("laps_max = 0", "line 1", "255"),
            ("laps_max = 300", "line 1", "300"),
            ("rest_ms = 1\n[[leave_alone]]\nlarger_than = \"1XB\"", "line", "KiB"),
            ("rest_ms = 1\n[[leave_alone]]", "line 2", "smaller_than"),
            ("policy = ", "line 1", ""),
        ] {
            let why = Rules::parse(text).unwrap_err();
            assert!(why.starts_with(line) && why.contains(word) && !why.contains('\n'), "{text:?}: {why}");
        }
    }

    #[test]
    fn names_of_mappings_are_read() {
        let names = names(std::process::id()).unwrap();
        assert!(names.iter().any(|(start, name)| *start > 0 && name == "[stack]"), "{names:?}");
        assert!(names.iter().any(|(_, name)| name.starts_with('/')));
    }
}
