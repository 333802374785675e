use std::os::unix::fs::MetadataExt;

use super::*;

const MIB: u64 = 1 << 20;
const LIFE: Life = Life { owner: [1, 2], number: 3 };

/// On the disk that the sources are on: /tmp may be memory.
fn folder() -> tempfile::TempDir {
    let target = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    tempfile::tempdir_in(target).unwrap()
}

fn open(path: &Path) -> Result<Medium, FileError> {
    Medium::open(path, 4 * MIB, false, None)
}

#[test]
fn a_new_file_has_its_room_at_once_and_gives_it_back_in_the_end() {
    let folder = folder();
    let path = folder.path().join("far0");
    let mut medium = open(&path).unwrap();
    assert_eq!((medium.frames, medium.blocks), (1024, 1024 + SPARE_MIN));
    let metadata = std::fs::metadata(&path).unwrap();
    assert!(metadata.blocks() * 512 >= HEADER_BYTES + u64::from(medium.blocks) * PAGE_BYTES, "reserved");
    assert_eq!(metadata.mode() & 0o777, 0o600, "nobody else's business");
    assert!(!medium.is_of(LIFE));
    medium.begin(LIFE).unwrap();
    assert!(medium.is_of(LIFE) && !medium.is_of(Life { number: 4, ..LIFE }));
    medium.give_back(LIFE).unwrap();
    assert!(!medium.is_of(LIFE), "given back is nobody's");
    let metadata = std::fs::metadata(&path).unwrap();
    assert!(metadata.blocks() * 512 <= 2 * HEADER_BYTES, "{} blocks are left", metadata.blocks());
    drop(medium);
    let again = open(&path).unwrap();
    assert!(std::fs::metadata(&path).unwrap().blocks() * 512 >= u64::from(again.blocks) * PAGE_BYTES);
}

#[test]
fn one_file_has_one_user() {
    let folder = folder();
    let path = folder.path().join("far0");
    let first = open(&path).unwrap();
    assert!(matches!(open(&path), Err(FileError::Locked(_))));
    let kept = first.file.clone();
    drop(first);
    assert!(matches!(open(&path), Err(FileError::Locked(_))), "the vault's descriptor has the lock");
    let next = Medium::open(&path, 4 * MIB, false, Some(kept)).unwrap();
    drop(next);
    open(&path).unwrap();
}

#[test]
fn somebody_elses_file_is_refused_and_stays_as_it_is() {
    let folder = folder();
    for (name, text) in [("text", &b"Dear Sir"[..]), ("long", &[7; 3 << 20])] {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        let error = open(&path).unwrap_err();
        assert!(matches!(error, FileError::Foreign { hint: Hint::Unknown, .. }), "{error}");
        assert!(error.to_string().contains("format = true"), "{error}");
        assert!(std::fs::read(&path).unwrap() == text, "touched");
        let mut medium = Medium::open(&path, 4 * MIB, true, None).unwrap();
        medium.begin(LIFE).unwrap();
        drop(medium);
        assert!(open(&path).unwrap().is_of(LIFE), "ours now");
    }
    let empty = folder.path().join("empty");
    std::fs::write(&empty, []).unwrap();
    open(&empty).unwrap();
}

#[test]
fn what_cannot_be_a_device_is_refused_by_name() {
    let folder = folder();
    assert!(matches!(open(folder.path()), Err(FileError::NotAFile(_))));
    assert!(matches!(open(Path::new("/dev/null")), Err(FileError::NotAFile(_))));
    let path = folder.path().join("missing/far0");
    assert!(matches!(open(&path), Err(FileError::NoFolder(_))));
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = memory.path().join("far0");
    assert!(matches!(open(&path), Err(FileError::InMemory(_))));
    assert!(!path.exists(), "a file that was made for nothing is removed");
    let path = folder.path().join("far0");
    // More than any disk has; nothing was allocated for it.
    let error = Medium::open(&path, (1 << 44) - (1 << 30), false, None).unwrap_err();
    assert!(matches!(error, FileError::NoRoom { .. }), "{error}");
    assert!(!path.exists());
}

#[test]
fn a_file_that_was_shrunk_is_as_long_as_it_was_and_says_so() {
    let folder = folder();
    let path = folder.path().join("far0");
    let mut medium = open(&path).unwrap();
    medium.begin(LIFE).unwrap();
    assert!(medium.was_short, "it was new");
    let kept = medium.file.clone();
    std::fs::File::options().write(true).open(&path).unwrap().set_len(2 * MIB).unwrap();
    let next = Medium::open(&path, 4 * MIB, false, Some(kept.clone())).unwrap();
    assert!(next.was_short && next.is_of(LIFE));
    let metadata = std::fs::metadata(&path).unwrap();
    assert!(metadata.len() >= HEADER_BYTES + u64::from(next.blocks) * PAGE_BYTES);
    let next = Medium::open(&path, 4 * MIB, false, Some(kept)).unwrap();
    assert!(!next.was_short);
}

#[test]
fn as_many_frames_as_have_room() {
    assert_eq!(fitting(511, 1000), None);
    for (room, wanted) in [(600, 1000), (1 << 20, 1 << 19), (1 << 20, 1 << 21), (1 << 24, u32::MAX - 100_000)] {
        let (frames, blocks) = fitting(room, wanted).unwrap();
        assert!(u64::from(blocks) <= room && frames <= wanted && blocks > frames);
        let more = shape((u64::from(frames) + 1) * PAGE_BYTES).1;
        assert!(frames == wanted || u64::from(more) > room, "{frames} of {room} could be more");
    }
}

/// Runs the test of that name again, in a mount namespace that these commands make.
fn in_a_namespace(commands: &str, test: &str, folder: &Path) {
    let exe = std::env::current_exe().unwrap();
    let script =
        format!("set -e; cd '{}'; {commands}; exec '{}' --ignored --exact '{test}'", folder.display(), exe.display());
    let output = std::process::Command::new("unshare").args(["-r", "-m", "sh", "-c", &script]).output();
    let output = output.expect("unshare (util-linux) starts");
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

#[test]
fn file_systems_without_direct_io_and_read_only_ones_are_refused() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    std::fs::create_dir(path("ramfs")).unwrap();
    std::fs::create_dir(path("read-only")).unwrap();
    open(&path("read-only/there")).unwrap();
    let commands = "mount -t ramfs ramfs ramfs; mount --bind read-only read-only; mount -o remount,ro,bind read-only";
    in_a_namespace(commands, "file::open::tests::in_a_namespace_with_such_file_systems", folder.path());
}

#[test]
#[ignore = "the test above runs it, in a namespace"]
fn in_a_namespace_with_such_file_systems() {
    let error = open(Path::new("ramfs/far0")).unwrap_err();
    assert!(matches!(error, FileError::NoDirect(_) | FileError::InMemory(_)), "{error}");
    assert!(!Path::new("ramfs/far0").exists());
    for name in ["new", "there"] {
        let error = open(&Path::new("read-only").join(name)).unwrap_err();
        assert!(matches!(error, FileError::NotWritable { reason: Errno::ROFS, .. }), "{name}: {error}");
    }
}
