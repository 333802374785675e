//! Real input: the text files under a path, in a fixed order, until there is enough.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A longer run of word characters is data (base64, a hash), not a word.
pub const MAX_WORD_BYTES: usize = 64;

/// What was read and what was left out.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Files whose text was taken.
    pub file_count: u64,
    /// Their size.
    pub text_bytes: u64,
    /// Files that are not text.
    pub binary_count: u64,
    /// Files and folders that could not be read.
    pub unreadable_count: u64,
}

/// Where a Linux machine with a Rust toolchain has text: what exists of it, most readable first.
pub fn default_roots() -> Vec<PathBuf> {
    let mut roots = vec![PathBuf::from("/usr/share/doc")];
    if let Some(sysroot) = rust_sysroot() {
        roots.extend(["share/doc", "lib/rustlib/src"].map(|folder| sysroot.join(folder)));
    }
    if let Some(home) = std::env::var_os("CARGO_HOME") {
        roots.push(PathBuf::from(home).join("registry/src"));
    } else if let Some(home) = std::env::var_os("HOME") {
        roots.push(PathBuf::from(home).join(".cargo/registry/src"));
    }
    roots.extend(["/usr/share", "/usr/include", "/usr/lib/python3"].map(PathBuf::from));
    roots.retain(|root| root.is_dir());
    roots
}

fn rust_sysroot() -> Option<PathBuf> {
    let output = Command::new("rustc").args(["--print", "sysroot"]).output().ok().filter(|out| out.status.success())?;
    let path = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim());
    path.is_dir().then_some(path)
}

/// Calls `take` with every text under `roots`, depth first and sorted by name, until it returns false. Symbolic links are not
/// followed; a folder that lies below two roots is read once.
pub fn for_each_text(roots: &[PathBuf], mut take: impl FnMut(&Path, &str, &Found) -> bool) -> Found {
    let mut found = Found::default();
    let mut seen = BTreeSet::new();
    // Depth first with an explicit stack; names are pushed in reverse, so that they come out in order.
    let mut stack: Vec<PathBuf> = roots.iter().rev().cloned().collect();
    while let Some(path) = stack.pop() {
        let Ok(kind) = fs::symlink_metadata(&path) else {
            found.unreadable_count += 1;
            continue;
        };
        if kind.is_dir() {
            if seen.insert(path.clone()) {
                push_children(&path, &mut stack, &mut found);
            }
        } else if kind.is_file() && kind.len() > 0 {
            match fs::read(&path).map(String::from_utf8) {
                Ok(Ok(text)) if !text.contains('\0') => {
                    found.file_count += 1;
                    found.text_bytes += text.len() as u64;
                    if !take(&path, &text, &found) {
                        break;
                    }
                }
                Ok(_) => found.binary_count += 1,
                Err(_) => found.unreadable_count += 1,
            }
        }
    }
    found
}

fn push_children(folder: &Path, stack: &mut Vec<PathBuf>, found: &mut Found) {
    let Ok(entries) = fs::read_dir(folder) else {
        found.unreadable_count += 1;
        return;
    };
    let mut children: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    children.sort_unstable_by(|a, b| b.cmp(a));
    stack.extend(children);
}

/// The words of a text: runs of letters, digits, `_` and everything outside ASCII.
pub fn words(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let is_word = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_' || *byte >= 0x80;
    text.split(move |byte| !is_word(byte)).filter(|word| (1..=MAX_WORD_BYTES).contains(&word.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_runs_of_word_characters() {
        let long = "x".repeat(MAX_WORD_BYTES + 1);
        let text = format!("Grüße, a_b-c  {long} 42.");
        let found: Vec<&[u8]> = words(text.as_bytes()).collect();
        assert_eq!(found, ["Grüße".as_bytes(), b"a_b", b"c", b"42"]);
    }

    #[test]
    fn files_come_in_order_once_and_without_binaries() {
        let dir = std::env::temp_dir().join(format!("uhmm-demo-text-{}", std::process::id()));
        fs::create_dir_all(dir.join("b")).unwrap();
        for (name, bytes) in [("c.txt", &b"three"[..]), ("a.txt", b"one"), ("b/x", b"two"), ("z.bin", b"\0\xff")] {
            fs::write(dir.join(name), bytes).unwrap();
        }
        let mut texts = Vec::new();
        let found = for_each_text(&[dir.clone(), dir.clone()], |_, text, _| {
            texts.push(text.to_owned());
            true
        });
        let mut first = None;
        for_each_text(std::slice::from_ref(&dir), |_, text, _| {
            first = Some(text.to_owned());
            false
        });
        fs::remove_dir_all(&dir).unwrap();
        assert_eq!(texts, ["one", "two", "three"]);
        assert_eq!((found.file_count, found.text_bytes, found.binary_count), (3, 11, 1));
        assert_eq!(first.as_deref(), Some("one"));
    }
}
