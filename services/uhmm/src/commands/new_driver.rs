//! `uhmm driver new NAME`: the teaching driver as the start of a new one, in a crate of its own outside of uhmm's workspace.
//!
//! The text is that of `drivers/edu`, which the tests run against a device, with its names exchanged: so the template cannot rot.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};

/// Sources by file name, and what only the new crate has.
const SOURCES: [(&str, &str); 4] = [
    ("src/lib.rs", include_str!("../../../../drivers/edu/src/lib.rs")),
    ("src/hardware.rs", include_str!("../../../../drivers/edu/src/hardware.rs")),
    ("src/frame.rs", include_str!("../../../../drivers/edu/src/frame.rs")),
    ("src/factorial.rs", include_str!("../../../../drivers/edu/src/factorial.rs")),
];
const MAIN: &str = include_str!("new_driver/main.rs.txt");
const CARGO: &str = include_str!("new_driver/Cargo.toml.txt");
const MANIFEST: &str = include_str!("new_driver/manifest.toml.txt");
/// So that `cargo fmt` changes what the author wrote, and nothing else.
const FORMAT: &str = include_str!("../../../../rustfmt.toml");
/// The versions that uhmm was tested with.
const LOCK: &str = include_str!("../../../../Cargo.lock");

/// `uhmm driver new`
#[derive(clap::Args)]
pub struct NewDriverArgs {
    /// Name of the driver: lower-case letters, digits and _
    name: String,
    /// Folder to make [default: NAME here]
    #[arg(long)]
    dir: Option<PathBuf>,
    /// uhmm's source tree, whose crates the driver is built with [default: the one that this program was built from]
    #[arg(long)]
    uhmm: Option<PathBuf>,
}

/// Writes the crate, and says what comes next.
pub fn new_driver(args: &NewDriverArgs) -> anyhow::Result<()> {
    let name = &args.name;
    // One letter less than a service's name may have: the device is NAME0.
    let legal = name.len() < 32
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    ensure!(
        legal,
        "{name:?} is no name for a crate: begin with a lower-case letter, go on with those, digits and _ (31 at most)"
    );
    let sources = args.uhmm.clone().unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."));
    let sources = fs::canonicalize(&sources).with_context(|| format!("{} is not there", sources.display()));
    let sources = sources.context("uhmm's source tree is needed to build drivers: name it with --uhmm")?;
    ensure!(sources.join("drivers/kit").exists(), "{} is not uhmm's source tree", sources.display());

    let dir = args.dir.clone().unwrap_or_else(|| PathBuf::from(name));
    fs::create_dir(&dir).with_context(|| format!("{} cannot be made: give another --dir", dir.display()))?;
    let dir = fs::canonicalize(dir)?;
    fs::create_dir(dir.join("src"))?;
    for (file, text) in SOURCES {
        write(&dir, file, &renamed(text, name))?;
    }
    let filled = |text: &str| {
        let (sources, dir) = (sources.display().to_string(), dir.display().to_string());
        // Services have no _ in their names.
        let service = name.replace('_', "-");
        text.replace("@NAME@", name).replace("@SERVICE@", &service).replace("@UHMM@", &sources).replace("@DIR@", &dir)
    };
    write(&dir, "src/main.rs", &filled(MAIN))?;
    write(&dir, "Cargo.toml", &filled(CARGO))?;
    write(&dir, "manifest.toml", &filled(MANIFEST))?;
    write(&dir, "Cargo.lock", LOCK)?;
    write(&dir, "rustfmt.toml", FORMAT)?;
    write(&dir, ".gitignore", "/target\n")?;
    println!("{} drives QEMU's educational device now.", dir.display());
    println!("1. cargo build --release      (in that folder)");
    println!("2. manifest.toml: the PCI address of your device");
    println!("3. uhmm up --manifest {}/manifest.toml", dir.display());
    println!("4. change src/hardware.rs, then src/frame.rs; docs/write-a-driver.md in uhmm's sources leads through it");
    Ok(())
}

fn write(dir: &Path, file: &str, text: &str) -> anyhow::Result<()> {
    let path = dir.join(file);
    fs::write(&path, text).with_context(|| format!("{} cannot be written", path.display()))
}

/// The teaching driver's text under another name: types (`EduQueue`), variables (`edu`) and texts (`"edu"`).
fn renamed(text: &str, name: &str) -> String {
    let mut camel = String::new();
    for part in name.split('_').filter(|part| !part.is_empty()) {
        camel.push_str(&part[..1].to_ascii_uppercase());
        camel.push_str(&part[1..]);
    }
    let mut out = String::new();
    let mut word = String::new();
    for c in text.chars().chain(['\0']) {
        if c.is_alphanumeric() || c == '_' {
            word.push(c);
            continue;
        }
        match word.strip_prefix("Edu") {
            Some(rest) if rest.is_empty() || rest.starts_with(|c: char| c.is_uppercase()) => out.extend([&camel, rest]),
            _ if word == "edu" => out.push_str(name),
            _ => out.push_str(&word),
        }
        word.clear();
        if c != '\0' {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_exchanged_and_words_that_begin_like_them_are_not() {
        let text = "QEMU's educational: EduQueue { edu: Edu }, \"edu\", memfd uhmm-edu-unit, Education";
        let expected =
            "QEMU's educational: BigChipQueue { big_chip: BigChip }, \"big_chip\", memfd uhmm-big_chip-unit, Education";
        assert_eq!(renamed(text, "big_chip"), expected);
    }

    #[test]
    fn no_name_of_the_template_is_left() {
        for (file, text) in SOURCES {
            let text = renamed(text, "chip");
            assert!(!text.contains("Edu") && !text.contains("\"edu\""), "{file}");
        }
    }
}
