//! The run directory, and folders in it to be given to those who run elsewhere: each has the sockets that its user may connect to and nothing else.
//!
//! ```text
//!   RUN_DIR/             0700: nobody else comes here
//!     join/NAME/         for the service NAME (or the holder): supervisor, holder, and what its channels lead to
//!     clients/           for programs: pager and drivers
//! ```
//! They are mounted into containers. The sockets in them are hard links: whoever is shown the folder may connect, whatever user it is there,
//! and nobody who is not. The folders stay as long as the run directory, since they are mounted; what is in them is exchanged.

use std::collections::BTreeSet;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use uhmm_kit::HOLDER_SOCKET;
use uhmm_manifest::{Kind, Plan};

use crate::service::{Supervisor, SupervisorError};
use crate::state::HOLDER;

/// Made when it is not there; refused where anybody else could get at it.
pub(crate) fn make_run_dir(path: &Path) -> Result<(), SupervisorError> {
    let refused = |problem: String| SupervisorError::RunDir { path: path.to_owned(), problem };
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|error| refused(error.to_string()))?;
    let meta = std::fs::symlink_metadata(path).map_err(|error| refused(error.to_string()))?;
    // Somebody else could have made it first, under a name that is easy to guess, to get hold of the sockets.
    if !meta.is_dir() || meta.uid() != rustix::process::geteuid().as_raw() || meta.mode() & 0o077 != 0 {
        return Err(refused("it must be a folder of this user with mode 0700: remove it or choose another".to_owned()));
    }
    Ok(())
}

/// Nothing of uhmm has run there: there is nothing to adopt, and nothing to wait for.
pub(crate) fn is_fresh(run_dir: &Path) -> bool {
    let left = |entry: std::fs::DirEntry| {
        let name = entry.file_name();
        name == "supervisor.toml" || Path::new(&name).extension().is_some_and(|extension| extension == "sock")
    };
    std::fs::read_dir(run_dir).is_ok_and(|mut entries| !entries.any(|entry| entry.is_ok_and(left)))
}

/// A folder below the run directory, and which sockets of the run directory it shows.
fn doors(plan: &Plan, run_dir: &Path) -> Vec<(PathBuf, BTreeSet<PathBuf>)> {
    if !plan.has_joining() {
        return Vec::new();
    }
    let endpoint = |name: &str| plan.endpoint_path(run_dir, name);
    // Whoever joins comes as a service: what it is shown lets nobody in as a client or an operator.
    let inner = |name: &str| crate::views::inner(&plan.endpoint_path(run_dir, name));
    let common = || BTreeSet::from([crate::views::inner(&run_dir.join("supervisor.sock"))]);
    let mut doors = Vec::new();
    for service in plan.services.iter().filter(|service| service.join.is_some()) {
        let channels = plan.channels.iter().filter(|channel| channel.from == service.name);
        let mut sockets = common();
        sockets.insert(run_dir.join(HOLDER_SOCKET));
        sockets.extend(channels.map(|channel| inner(&channel.to)));
        doors.push((run_dir.join("join").join(&service.name), sockets));
    }
    if plan.holder_join.is_some() {
        doors.push((run_dir.join("join").join(HOLDER), common()));
    }
    let for_clients = plan.services.iter().filter(|service| service.kind != Kind::Mirror);
    doors.push((run_dir.join("clients"), for_clients.map(|service| endpoint(&service.name)).collect()));
    doors
}

/// Shows the same socket under another name. One that is not there (yet) is left out.
pub(crate) fn show(socket: &Path, folder: &Path) -> std::io::Result<()> {
    let Ok(there) = std::fs::symlink_metadata(socket) else { return Ok(()) };
    let Some(name) = socket.file_name() else { return Ok(()) };
    let shown = folder.join(name);
    if std::fs::symlink_metadata(&shown).is_ok_and(|shown| (shown.dev(), shown.ino()) == (there.dev(), there.ino())) {
        return Ok(());
    }
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o666))?;
    let fresh = folder.join(".new");
    match std::fs::remove_file(&fresh) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    std::fs::hard_link(socket, &fresh)?;
    std::fs::rename(&fresh, &shown)
}

/// Everybody who is shown it may look into it, whatever this process's umask (a unit of systemd has 0077).
fn make_shown(folder: &Path) -> std::io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o755).create(folder)?;
    let mode = std::fs::metadata(folder)?.mode() & 0o7777;
    if mode & 0o755 == 0o755 {
        return Ok(());
    }
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(mode | 0o755))
}

impl<F: FnOnce()> Supervisor<F> {
    /// After any socket was made.
    pub(crate) fn open_doors(&self) -> Result<(), SupervisorError> {
        for (folder, sockets) in doors(&self.plan, &self.options.run_dir) {
            let failed =
                |error: std::io::Error| SupervisorError::RunDir { path: folder.clone(), problem: error.to_string() };
            make_shown(&folder).map_err(failed)?;
            sockets.iter().try_for_each(|socket| show(socket, &folder)).map_err(failed)?;
        }
        self.make_views()
    }

    /// Everything has ended in order.
    pub(crate) fn close_doors(&self) {
        for (folder, sockets) in doors(&self.plan, &self.options.run_dir) {
            for name in sockets.iter().filter_map(|socket| socket.file_name()) {
                if let Err(error) = std::fs::remove_file(folder.join(name)) {
                    tracing::debug!(%error, folder = %folder.display(), "Was not there");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use uhmm_kernel_hook::{SeqListener, SeqPacket};
    use uhmm_manifest::Manifest;

    use super::*;

    #[test]
    fn what_is_shown_can_be_looked_into_whatever_the_umask_was() {
        let dir = tempfile::tempdir().expect("a folder");
        let mode = |folder: &Path| std::fs::metadata(folder).expect("a folder").mode() & 0o7777;
        let folder = dir.path().join("join/soft0");
        for (before, after) in [(None, 0o755), (Some(0o700), 0o755), (Some(0o777), 0o777)] {
            if let Some(bits) = before {
                std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(bits)).expect("chmod");
            }
            make_shown(&folder).expect("made");
            assert_eq!(mode(&folder), after, "before: {before:?}");
        }
    }

    const MANIFEST: &str = r#"
holder = { join = { uid = 7 } }
[[service]]
name = "pager"
kind = "pager"
[[service]]
name = "mirror"
kind = "mirror"
[[service]]
name = "d0"
kind = "driver"
driver = "soft"
join = { uid = 8 }
[[service]]
name = "d1"
kind = "driver"
driver = "soft"
[[device]]
name = "chip0"
service = "d0"
[[device]]
name = "chip1"
service = "d1"
"#;

    #[test]
    fn each_folder_shows_what_its_user_may_call_and_nothing_else() {
        let plan = Manifest::parse(MANIFEST).expect("TOML").resolve().expect("a plan");
        let shown = |folder: &str| {
            let doors = doors(&plan, Path::new("/r"));
            let found = doors.into_iter().find(|(path, _)| path == &Path::new("/r").join(folder)).expect("a folder").1;
            found.iter().map(|path| path.strip_prefix("/r").expect("below").display().to_string()).collect::<Vec<_>>()
        };
        let services = ["holder.sock", "inner/mirror.sock", "inner/pager.sock", "inner/supervisor.sock"];
        assert_eq!(shown("join/d0"), services);
        assert_eq!(shown("join/holder"), ["inner/supervisor.sock"]);
        assert_eq!(shown("clients"), ["driver-chip0.sock", "driver-chip1.sock", "pager.sock"]);
        assert_eq!(doors(&plan, Path::new("/r")).len(), 3, "d1 does not join");
        assert!(doors(&Manifest::built_in().resolve().expect("a plan"), Path::new("/r")).is_empty());
    }

    #[test]
    fn a_socket_is_the_same_through_its_other_name_and_a_new_one_replaces_it() {
        let dir = tempfile::tempdir().expect("a folder");
        let (socket, folder) = (dir.path().join("s.sock"), dir.path().join("shown"));
        std::fs::create_dir(&folder).expect("a folder");
        show(&socket, &folder).expect("nothing to show yet");
        for _ in 0..2 {
            let listener = SeqListener::bind(&socket).expect("bind");
            for _ in 0..2 {
                show(&socket, &folder).expect("shown");
            }
            let _client = SeqPacket::connect(&folder.join("s.sock")).expect("connect");
            assert!(listener.accept().expect("accept").is_some());
            drop(listener);
            assert_eq!(std::fs::read_dir(&folder).expect("read").count(), 1);
        }
    }
}
