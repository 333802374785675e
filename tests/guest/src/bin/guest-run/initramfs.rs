//! The guest's file system: a cpio archive ("newc"), unpacked by the kernel at boot.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};

use crate::build::Programs;
use crate::kernel::Kernel;

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// Writes `/init`, `/suites/*`, `/helpers/*`, `/modules/*`, files of this machine, and the console that pid 1 starts with.
pub fn write(path: &Path, kernel: &Kernel, programs: &Programs) -> Result<()> {
    let file = File::create(path).with_context(|| format!("Create {}", path.display()))?;
    let mut archive = Archive { out: BufWriter::new(file), inode: 0, offset: 0 };
    for name in ["dev", "proc", "sys", "tmp", "modules", "suites", "helpers"] {
        archive.entry(name, DIRECTORY, (0, 0), &[])?;
    }
    archive.entry("dev/console", CHARACTER_DEVICE, (5, 1), &[])?;
    archive.file("init", &programs.init)?;
    for module in &kernel.modules {
        let name = module.file_name().context("A module has a name")?.to_string_lossy();
        archive.file(&format!("modules/{name}"), module)?;
    }
    for (name, program) in &programs.suites {
        archive.file(&format!("suites/{name}"), program)?;
    }
    for (name, program) in &programs.helpers {
        archive.file(&format!("helpers/{name}"), program)?;
    }
    let mut made = BTreeSet::new();
    for (inside, file) in &programs.machine {
        let folders: Vec<_> = inside.ancestors().skip(1).filter(|folder| folder.parent().is_some()).collect();
        for folder in folders.into_iter().rev() {
            if made.insert(folder) {
                archive.entry(&relative(folder)?, DIRECTORY, (0, 0), &[])?;
            }
        }
        archive.file(&relative(inside)?, file)?;
    }
    archive.entry("TRAILER!!!", 0, (0, 0), &[])?;
    archive.out.flush().context("Write the initramfs")
}

/// As names are in an archive.
fn relative(path: &Path) -> Result<String> {
    Ok(path.strip_prefix("/").context("Paths inside are absolute")?.to_str().context("A path is text")?.to_owned())
}

struct Archive<W> {
    out: W,
    inode: u32,
    offset: usize,
}

impl<W: Write> Archive<W> {
    fn file(&mut self, name: &str, from: &Path) -> Result<()> {
        let bytes = fs::read(from).with_context(|| format!("Read {}", from.display()))?;
        Ok(self.entry(name, PROGRAM, (0, 0), &bytes)?)
    }

    /// Magic and 13 numbers of eight hexadecimal digits, name with its zero byte, content; both padded to four bytes.
    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), bytes: &[u8]) -> io::Result<()> {
        self.inode += 1;
        let (len, name_len) = (bytes.len() as u32, name.len() as u32 + 1);
        let fields =
            [self.inode, mode, 0, 0, 1, 0, len, 0, 0, device.0, device.1, name_len, 0].map(|n| format!("{n:08x}"));
        self.put(format!("070701{}{name}\0", fields.concat()).as_bytes())?;
        self.put(bytes)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.offset += bytes.len();
        let padding = self.offset.next_multiple_of(4) - self.offset;
        self.out.write_all(&[0; 3][..padding])?;
        self.offset += padding;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_padded_and_say_their_lengths() {
        let mut archive = Archive { out: Vec::new(), inode: 0, offset: 0 };
        archive.entry("abc", PROGRAM, (0, 0), b"hello").unwrap();
        let text = String::from_utf8(archive.out).unwrap();
        assert_eq!(text.len(), (110 + 4 + 2) + 8);
        assert!(text.starts_with("07070100000001000081ed"));
        assert_eq!((&text[54..62], &text[94..102]), ("00000005", "00000004"));
        assert!(text.ends_with("abc\0\0\0hello\0\0\0"));
    }
}
