//! A mount namespace in which some folders are empty and some entries are there all the same.

use std::ffi::{CStr, CString};
use std::io;
use std::path::{Path, PathBuf};

use super::{Folders, c_path};
use crate::error::HookError;

/// Entries that a process is shown.
const BINDS_MAX: usize = 16;
const TMPFS_OPTIONS: &CStr = c"size=256k,mode=755";

/// Names as the child needs them.
#[derive(Debug)]
pub(super) struct Prepared {
    covered: Vec<CString>,
    binds: Vec<Bind>,
}

#[derive(Debug)]
struct Bind {
    source: CString,
    target: CString,
    /// To be made below a covered folder, outermost first.
    parents: Vec<CString>,
    is_folder: bool,
}

impl Prepared {
    pub(super) fn of(folders: &Folders) -> Result<Self, HookError> {
        // A name that is a symbolic link (/var/run) stands for what is covered already, or for nothing.
        let is_folder = |path: &&PathBuf| path.symlink_metadata().is_ok_and(|meta| meta.is_dir());
        let covered: Vec<&PathBuf> = folders.covered.iter().filter(is_folder).collect();
        let below = |path: &Path| covered.iter().find(|cover| path.starts_with(cover)).map(|cover| cover.to_path_buf());
        let shown = folders.shown.iter().filter(|path| below(path).is_some() && path.exists());
        let mut binds = Vec::new();
        let pairs = shown.map(|path| (path.clone(), path.clone())).chain(folders.view.clone());
        for (source, target) in pairs {
            let cover = below(&target);
            let ancestors = target.ancestors().skip(1);
            let mut parents: Vec<&Path> =
                ancestors.take_while(|path| cover.as_ref().is_some_and(|cover| *path != cover)).collect();
            parents.reverse();
            binds.push(Bind {
                source: c_path(&source)?,
                target: c_path(&target)?,
                parents: parents.into_iter().map(c_path).collect::<Result<_, _>>()?,
                is_folder: source.is_dir(),
            });
        }
        if binds.len() > BINDS_MAX {
            return Err(HookError::BadMessage("it shows more than 16 files and folders to a confined process"));
        }
        let covered = covered.into_iter().map(|path| c_path(path)).collect::<Result<_, _>>()?;
        Ok(Self { covered, binds })
    }

    /// In the child, in a mount namespace of its own.
    pub(super) fn mount(&self) -> io::Result<()> {
        // What is mounted outside later comes in; nothing goes out.
        mount(None, c"/", None, libc::MS_REC | libc::MS_SLAVE, None)?;
        let mut sources = [-1; BINDS_MAX];
        for (source, bind) in sources.iter_mut().zip(&self.binds) {
            // SAFETY: a name that ends with a zero.
            *source = unsafe { libc::open(bind.source.as_ptr(), libc::O_PATH | libc::O_CLOEXEC) };
            if *source < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        for cover in &self.covered {
            mount(Some(c"tmpfs"), cover, Some(c"tmpfs"), libc::MS_NOSUID | libc::MS_NODEV, Some(TMPFS_OPTIONS))?;
        }
        for (source, bind) in sources.iter().zip(&self.binds) {
            bind.make();
            let mut name = [0; 32];
            mount(Some(fd_name(*source, &mut name)), &bind.target, None, libc::MS_BIND | libc::MS_REC, None)?;
            // SAFETY: opened above, and used by nobody else.
            unsafe { libc::close(*source) };
        }
        // A working directory below what is hidden would still show it.
        // SAFETY: a name that ends with a zero.
        match unsafe { libc::chdir(c"/".as_ptr()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Bind {
    /// Makes its place. What is there already is as good.
    fn make(&self) {
        // SAFETY: names that end with a zero.
        unsafe {
            for parent in &self.parents {
                libc::mkdir(parent.as_ptr(), 0o755);
            }
            if self.is_folder {
                libc::mkdir(self.target.as_ptr(), 0o755);
            } else {
                let made = libc::open(self.target.as_ptr(), libc::O_CREAT | libc::O_RDONLY | libc::O_CLOEXEC, 0o644);
                if made >= 0 {
                    libc::close(made);
                }
            }
        }
    }
}

/// `/proc/self/fd/NUMBER`, without an allocation.
fn fd_name(number: i32, place: &mut [u8; 32]) -> &CStr {
    const BEFORE: &[u8] = b"/proc/self/fd/";
    let (mut digits, mut left, mut count) = ([0u8; 10], number.unsigned_abs(), 0);
    loop {
        digits[count] = b'0' + (left % 10) as u8;
        (left, count) = (left / 10, count + 1);
        if left == 0 {
            break;
        }
    }
    place[..BEFORE.len()].copy_from_slice(BEFORE);
    for (at, digit) in digits[..count].iter().rev().enumerate() {
        place[BEFORE.len() + at] = *digit;
    }
    CStr::from_bytes_until_nul(place).unwrap_or(c"/")
}

fn mount(
    source: Option<&CStr>,
    target: &CStr,
    kind: Option<&CStr>,
    flags: libc::c_ulong,
    options: Option<&CStr>,
) -> io::Result<()> {
    let name = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
    // SAFETY: names that end with a zero, or none.
    match unsafe { libc::mount(name(source), target.as_ptr(), name(kind), flags, name(options).cast()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// For tests of names.
#[cfg(test)]
pub(super) fn name_of(number: i32) -> String {
    let mut place = [0; 32];
    String::from_utf8_lossy(fd_name(number, &mut place).to_bytes()).into_owned()
}

#[cfg(test)]
pub(super) fn parents_of(folders: &Folders) -> Vec<Vec<String>> {
    let text = |path: &CString| String::from_utf8_lossy(path.to_bytes()).into_owned();
    let prepared = Prepared::of(folders).expect("names");
    prepared.binds.iter().map(|bind| bind.parents.iter().map(text).collect()).collect()
}
