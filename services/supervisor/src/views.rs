//! What a confined service sees in the place of the run directory: the sockets that it may connect to, and nothing else.
//!
//! ```text
//!   RUN_DIR/pager.sock            clients, operators
//!   RUN_DIR/inner/pager.sock      a second socket of the same service, which lets services in alone
//!   RUN_DIR/view/NAME/pager.sock  a link to the inner one, if the plan has the channel
//!                                 \__ mounted over RUN_DIR in the mount namespace of service NAME
//! ```
//! So a driver can neither reach another driver's socket nor call itself a client or an operator. The folder is mounted, not the sockets: those
//! of a new supervisor or holder are linked into it (as those who join are shown theirs: `doors.rs`).

use std::io;
use std::os::unix::fs::{DirBuilderExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use uhmm_kernel_hook::SeqListener;
use uhmm_kit::HOLDER_SOCKET;
use uhmm_manifest::{Plan, SandboxMode};
use uhmm_sandbox::Place;

use crate::service::{Supervisor, SupervisorError, bind_after};

const INNER: &str = "inner";
const VIEW: &str = "view";

/// The service's second socket.
pub(crate) fn bind_inner_of(run_dir: &Path, plan: &Plan, name: &str) -> Result<SeqListener, SupervisorError> {
    let path = plan.endpoint_path(run_dir, name);
    bind_inner(run_dir, &path.file_name().unwrap_or_default().to_string_lossy(), Duration::ZERO)
}

/// A socket that services see by the name of the outer one.
pub(crate) fn bind_inner(run_dir: &Path, file: &str, patience: Duration) -> Result<SeqListener, SupervisorError> {
    let path = run_dir.join(INNER).join(file);
    let folder = run_dir.join(INNER);
    make_folder(&folder).map_err(|error| SupervisorError::RunDir { path: folder, problem: error.to_string() })?;
    bind_after(&path, patience).map_err(|source| SupervisorError::Socket { path, source })
}

/// The second socket of the same name.
pub(crate) fn inner(outer: &Path) -> PathBuf {
    let folder = outer.parent().unwrap_or(Path::new("/")).join(INNER);
    folder.join(outer.file_name().unwrap_or_default())
}

fn make_folder(path: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Everything has ended in order.
pub(crate) fn remove(run_dir: &Path) {
    for folder in [VIEW, INNER] {
        if let Err(error) = std::fs::remove_dir_all(run_dir.join(folder)) {
            tracing::debug!(%error, folder, "Was not there");
        }
    }
}

impl<F: FnOnce()> Supervisor<F> {
    pub(crate) fn place(&self) -> Place {
        Place { run_dir: self.options.run_dir.clone(), exe: self.options.exe.clone() }
    }

    /// Of every service, with the sockets that there are now.
    pub(crate) fn make_views(&self) -> Result<(), SupervisorError> {
        (0..self.plan.services.len()).try_for_each(|service| self.make_view(service))
    }

    /// Of one.
    pub(crate) fn make_view(&self, service: usize) -> Result<(), SupervisorError> {
        let plan = &self.plan.services[service];
        if plan.sandbox.mode == SandboxMode::Off || plan.join.is_some() {
            return Ok(());
        }
        let view = self.place().view(&plan.name);
        self.fill_view(service, &view).map_err(|error| SupervisorError::RunDir {
            path: view,
            problem: format!("{error}: a service sees its sockets there (it must be on a file system with links)"),
        })
    }

    fn fill_view(&self, service: usize, view: &Path) -> io::Result<()> {
        let (plan, run_dir) = (&self.plan.services[service], &self.options.run_dir);
        make_folder(view)?;
        let inner = run_dir.join(INNER);
        let called = self.plan.channels.iter().filter(|channel| channel.from == plan.name);
        let file_of =
            |name: &str| PathBuf::from(self.plan.endpoint_path(run_dir, name).file_name().unwrap_or_default());
        let mut sockets: Vec<PathBuf> = called.map(|channel| inner.join(file_of(&channel.to))).collect();
        sockets.extend([inner.join("supervisor.sock"), run_dir.join(HOLDER_SOCKET)]);
        sockets.extend(self.place().device_sockets(&self.plan, &plan.name));
        for socket in sockets.iter().filter(|socket| socket.exists()) {
            crate::doors::show(socket, view)?;
        }
        if let Some(account) = &plan.account {
            chown(view, Some(account.uid), Some(account.gid))?;
        }
        Ok(())
    }
}
