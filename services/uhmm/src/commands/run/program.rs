//! Which file a command is, and whether the library that `uhmm run` preloads will run in it. What could not work is said before anything
//! starts: ld.so itself only prints a warning, or says nothing at all.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use object::elf::{EM_X86_64, FileHeader64};
use object::read::elf::{FileHeader, ProgramHeader};
use object::{Endianness, ReadCache, ReadRef};

/// Interpreters of interpreters that are followed, as the kernel does.
const SCRIPTS_MAX: usize = 4;
/// Of a script's first line.
const LINE_BYTES: usize = 256;

/// Why a program cannot be started, or not with uhmm.
#[derive(Debug, thiserror::Error)]
pub enum Unsuitable {
    #[error("{} is not found: give its path, or see $PATH", .0.display())]
    NotFound(PathBuf),
    #[error("{} cannot be executed: {why}", .path.display())]
    NotExecutable { path: PathBuf, why: String },
    #[error(
        "{} is linked statically, and nothing can be loaded into it: take a dynamically linked build of it, or run it without uhmm (--or-without)",
        .0.display()
    )]
    Static(PathBuf),
    #[error(
        "{} gets more rights than its caller (setuid, setgid or file capabilities), and ld.so loads nothing of the caller's into such programs: start it \
         as the user that it becomes, or without uhmm (--or-without)",
        .0.display()
    )]
    MoreRights(PathBuf),
    #[error("{} is for another machine, and uhmm's library is for 64-bit x86: take such a build, or run it without uhmm (--or-without)", .0.display())]
    OtherMachine(PathBuf),
    #[error(
        "{} is loaded by {loader}, and uhmm's library needs the C library of GNU: take such a build, or run it without uhmm (--or-without)",
        .path.display()
    )]
    OtherLoader { path: PathBuf, loader: String },
}

impl Unsuitable {
    /// It can run, but not with uhmm.
    pub fn runs_without(&self) -> bool {
        !matches!(self, Self::NotFound(_) | Self::NotExecutable { .. })
    }

    /// As shells and `env` have it: 127 not found, 126 cannot be executed, 125 is uhmm's own.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NotFound(_) => 127,
            Self::NotExecutable { .. } => 126,
            _ => 125,
        }
    }
}

/// The file that a command's first word means, as execvp finds it.
pub fn find(name: &OsStr, path: Option<OsString>) -> Result<PathBuf, Unsuitable> {
    let named = Path::new(name);
    let not_found = || Unsuitable::NotFound(named.to_owned());
    if name.as_bytes().contains(&b'/') {
        return if named.exists() { Ok(named.to_owned()) } else { Err(not_found()) };
    }
    let path = path.unwrap_or_else(|| OsString::from("/usr/local/bin:/usr/bin:/bin"));
    let executable = |path: &PathBuf| path.is_file() && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok();
    std::env::split_paths(&path).map(|folder| folder.join(named)).find(executable).ok_or_else(not_found)
}

/// Whether what the file runs, through its interpreters if it is a script, can be run with uhmm.
pub fn check(path: &Path) -> Result<(), Unsuitable> {
    let mut path = path.to_owned();
    for _ in 0..SCRIPTS_MAX {
        let refuse = |why: String| Unsuitable::NotExecutable { path: path.clone(), why };
        rustix::fs::access(&path, rustix::fs::Access::EXEC_OK).map_err(|error| refuse(error.to_string()))?;
        let mut file = File::open(&path).map_err(|error| refuse(error.to_string()))?;
        let about = file.metadata().map_err(|error| refuse(error.to_string()))?;
        if !about.is_file() {
            return Err(refuse("it is no file".into()));
        }
        let mut line = [0; LINE_BYTES];
        let read = file.read(&mut line).map_err(|error| refuse(error.to_string()))?;
        match interpreter(&line[..read]) {
            Some(next) => path = next,
            None => return check_binary(&path, file, &about),
        }
    }
    Err(Unsuitable::NotExecutable { path, why: "it is a script of a script of a script ...".into() })
}

/// Of a script, by its first line.
fn interpreter(begin: &[u8]) -> Option<PathBuf> {
    let line = begin.strip_prefix(b"#!")?.split(|byte| *byte == b'\n').next()?;
    let word = line.split(u8::is_ascii_whitespace).find(|word| !word.is_empty())?;
    Some(PathBuf::from(OsStr::from_bytes(word)))
}

fn check_binary(path: &Path, file: File, about: &Metadata) -> Result<(), Unsuitable> {
    let cache = ReadCache::new(file);
    match loader(&cache) {
        Ok(Some(loader)) if loader.contains("musl") => Err(Unsuitable::OtherLoader { path: path.into(), loader }),
        Ok(Some(_)) if gets_more_rights(path, about) => Err(Unsuitable::MoreRights(path.into())),
        Ok(Some(_)) => Ok(()),
        Ok(None) => Err(Unsuitable::Static(path.into())),
        Err(Odd::OtherMachine) => Err(Unsuitable::OtherMachine(path.into())),
        // A script without a first line that says so: execvp gives it to /bin/sh.
        Err(Odd::NoElf) => Err(Unsuitable::NotExecutable {
            path: path.into(),
            why: "it is neither a program nor a script with #!".into(),
        }),
    }
}

enum Odd {
    NoElf,
    OtherMachine,
}

/// Who loads a program's libraries; `None`: nobody, it is static.
fn loader<'data>(data: impl ReadRef<'data>) -> Result<Option<String>, Odd> {
    const CLASS: usize = 4;
    const CLASS_64: u8 = 2;
    let ident = data.read_bytes_at(0, 16).map_err(|()| Odd::NoElf)?;
    if !ident.starts_with(b"\x7fELF") {
        return Err(Odd::NoElf);
    }
    if ident[CLASS] != CLASS_64 {
        return Err(Odd::OtherMachine);
    }
    let header = FileHeader64::<Endianness>::parse(data).map_err(|_| Odd::NoElf)?;
    let endian = header.endian().map_err(|_| Odd::NoElf)?;
    if header.e_machine(endian) != EM_X86_64 {
        return Err(Odd::OtherMachine);
    }
    let segments = header.program_headers(endian, data).map_err(|_| Odd::NoElf)?;
    let mut named = segments.iter().filter_map(|segment| segment.interpreter(endian, data).ok().flatten());
    Ok(named.next().map(|loader| String::from_utf8_lossy(loader).into_owned()))
}

/// Whether the kernel will say AT_SECURE to it.
fn gets_more_rights(path: &Path, about: &Metadata) -> bool {
    const SETUID: u32 = 0o4000;
    const SETGID: u32 = 0o2010;
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    let other_user = about.mode() & SETUID != 0 && about.uid() != uid.as_raw();
    let other_group = about.mode() & SETGID == SETGID && about.gid() != gid.as_raw();
    let mut one = [0u8; 1];
    let capable = match rustix::fs::getxattr(path, "security.capability", &mut one[..]) {
        Ok(_) | Err(rustix::io::Errno::RANGE) => !uid.is_root(),
        Err(_) => false,
    };
    other_user || other_group || capable
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_command_is_found_as_a_shell_finds_it() {
        let path = || Some(OsString::from("/nonexistent:/bin:/usr/bin"));
        assert!(find(OsStr::new("sh"), path()).unwrap().ends_with("sh"));
        assert_eq!(find(OsStr::new("/bin/sh"), None).unwrap(), Path::new("/bin/sh"));
        for missing in ["no-such-program", "/bin/no-such-program"] {
            let error = find(OsStr::new(missing), path()).unwrap_err();
            assert_eq!((error.exit_code(), error.runs_without()), (127, false));
            assert!(error.to_string().contains(missing), "{error}");
        }
    }

    #[test]
    fn dynamic_programs_and_scripts_of_such_are_fine() {
        let dir = tempfile::tempdir().unwrap();
        check(Path::new("/bin/sh")).unwrap();
        let script = write(dir.path(), "script", b"#! /bin/sh -e\ntrue\n", 0o755);
        check(&script).unwrap();
        let outer = write(dir.path(), "outer", format!("#!{}\n", script.display()).as_bytes(), 0o755);
        check(&outer).unwrap();
    }

    #[test]
    fn what_cannot_work_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let shell = std::fs::read("/bin/sh").unwrap();
        let is = |name, bytes: &[u8], mode| check(&write(dir.path(), name, bytes, mode)).unwrap_err();
        assert!(
            matches!(is("plain", &shell, 0o644), Unsuitable::NotExecutable { .. })
                || rustix::process::geteuid().is_root()
        );
        assert!(matches!(is("text", b"hello", 0o755), Unsuitable::NotExecutable { .. }));
        assert!(matches!(is("empty", b"", 0o755), Unsuitable::NotExecutable { .. }));
        assert!(matches!(
            is("loop", format!("#!{}\n", dir.path().join("loop").display()).as_bytes(), 0o755),
            Unsuitable::NotExecutable { .. }
        ));
        let changed = |at: usize, value: u8| {
            let mut bytes = shell.clone();
            bytes[at] = value;
            bytes
        };
        assert!(matches!(is("32 bit", &changed(4, 1), 0o755), Unsuitable::OtherMachine(_)));
        assert!(matches!(is("arm", &changed(18, 183), 0o755), Unsuitable::OtherMachine(_)));
        // No program headers are left: nothing names a loader.
        let error = is("static", &changed(56, 0), 0o755);
        assert!(matches!(error, Unsuitable::Static(_)) && error.to_string().contains("--or-without"), "{error}");
        assert_eq!((error.exit_code(), error.runs_without()), (125, true));
        let place = shell.windows(9).position(|part| part == b"ld-linux-").unwrap();
        let mut musl = shell.clone();
        musl[place..place + 9].copy_from_slice(b"ld-musl-x");
        assert!(matches!(is("musl", &musl, 0o755), Unsuitable::OtherLoader { .. }));
    }

    #[test]
    fn who_gets_more_rights_is_known_by_mode_and_owner() {
        let dir = tempfile::tempdir().unwrap();
        let path = write(dir.path(), "program", &std::fs::read("/bin/sh").unwrap(), 0o4755);
        // Its own user becomes nobody else by it.
        check(&path).unwrap();
        let about = std::fs::metadata("/bin/sh").unwrap();
        assert!(!gets_more_rights(Path::new("/bin/sh"), &about));
    }

    fn write(dir: &Path, name: &str, bytes: &[u8], mode: u32) -> PathBuf {
        let path = dir.join(name);
        std::fs::write(&path, bytes).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        path
    }
}
