//! Two reactors in two threads over real sockets.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use uhmm_ipc::message::{Fd, Interface, Role};
use uhmm_ipc::{Endpoint, Identity, Limits, LinkId, Reactor, Wake, Waker};
use uhmm_kernel_hook::{SeqListener, memfd};

/// Nothing here takes long; a test that waits this long has failed.
pub const PATIENCE: Duration = Duration::from_secs(20);
pub const KEY: &[u8] = b"channel key of the tests";

pub fn identity(name: &str, role: Role, incarnation: u32, interface: Option<Interface>) -> Identity {
    Identity { name: name.into(), role, incarnation, interface, limits: Limits::default() }
}

/// A socket that outlives its server, as in the supervisor's vault.
pub struct Place {
    _dir: tempfile::TempDir,
    pub path: PathBuf,
    pub listener: SeqListener,
}

impl Place {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("service.sock");
        let listener = SeqListener::bind(&path).expect("listener");
        Self::at(dir, path, listener)
    }

    pub fn at(dir: tempfile::TempDir, path: PathBuf, listener: SeqListener) -> Self {
        Self { _dir: dir, path, listener }
    }
}

/// A reactor in a thread of its own; stops when dropped or told to.
pub struct Server {
    stop: Arc<AtomicBool>,
    waker: Waker,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves `interface` at `place` with `answer` for every wake.
    pub fn start(
        place: &Place,
        interface: Interface,
        incarnation: u32,
        answer: impl FnMut(&mut Reactor, Wake) + Send + 'static,
    ) -> Self {
        Self::start_as(place, identity("server", Role::Pager, incarnation, Some(interface)), answer)
    }

    pub fn start_as(
        place: &Place,
        identity: Identity,
        mut answer: impl FnMut(&mut Reactor, Wake) + Send + 'static,
    ) -> Self {
        let mut reactor = Reactor::new(identity).expect("reactor");
        reactor.set_channel_key("mirror", KEY.to_vec());
        reactor.listen(place.listener.try_clone().expect("duplicate")).expect("listen");
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, waker) = (stop.clone(), reactor.waker());
        let thread = std::thread::spawn(move || {
            let mut wakes = Vec::new();
            while !stopped.load(Ordering::Acquire) {
                reactor.poll(Some(PATIENCE), &mut wakes).expect("poll");
                for wake in wakes.drain(..) {
                    answer(&mut reactor, wake);
                }
            }
        });
        Self { stop, waker, thread: Some(thread) }
    }

    /// Ends the thread; all its connections close.
    pub fn kill(mut self) {
        self.join();
    }

    fn join(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.waker.wake();
        if let Some(thread) = self.thread.take()
            && let Err(panic) = thread.join()
            && !std::thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.join();
    }
}

/// A calling reactor with one link.
pub struct Caller {
    pub reactor: Reactor,
    pub link: LinkId,
    seen: Vec<Wake>,
}

impl Caller {
    pub fn client(path: &Path, interface: Interface) -> Self {
        Self::new(identity("client", Role::Client, 0, None), path, interface, &[])
    }

    pub fn new(identity: Identity, path: &Path, interface: Interface, key: &[u8]) -> Self {
        let mut reactor = Reactor::new(identity).expect("reactor");
        let link = reactor.link(Endpoint { path: path.to_owned(), interface, key: key.to_vec() });
        Self { reactor, link, seen: Vec::new() }
    }

    /// Polls until a wake is what `wanted` looks for; wakes that are not stay for later calls.
    pub fn until<T>(&mut self, what: &str, mut wanted: impl FnMut(&Wake) -> Option<T>) -> T {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some((index, found)) =
                self.seen.iter().enumerate().find_map(|(index, wake)| wanted(wake).map(|found| (index, found)))
            {
                self.seen.remove(index);
                return found;
            }
            assert!(Instant::now() < end, "Waited in vain for {what}; there are {:?}", self.seen);
            self.reactor.poll(Some(PATIENCE), &mut self.seen).expect("poll");
        }
    }

    /// What came besides what was waited for.
    pub fn rest(&self) -> &[Wake] {
        &self.seen
    }
}

/// A sealed memfd that holds `text`.
pub fn memory_with(text: &[u8]) -> Fd {
    let fd = memfd::create_sealed("test", 4096).expect("memfd");
    assert_eq!(rustix::io::pwrite(&fd, text, 0).expect("written"), text.len());
    Arc::new(fd)
}

/// The first bytes of a memfd.
pub fn text_of(fd: &Fd, len: usize) -> Vec<u8> {
    let mut text = vec![0; len];
    assert_eq!(rustix::io::pread(fd, &mut text, 0).expect("read"), len);
    text
}
