//! Metrics and health over HTTP: a Unix socket in the run directory, and a loopback address where that is wanted. One answer a connection.
//!
//! | path | answer |
//! | --- | --- |
//! | `/metrics` | the exposition |
//! | `/healthz` | 200: the supervisor answers |
//! | `/readyz` | 200: every service is ready; else 503 and those that are not |
//!
//! Nobody who connects is trusted: a request has a bounded length and a deadline, so many are served at a time, and nothing but these three
//! paths is answered. What is served can be read by whoever may connect: the Unix socket is for this account, the loopback address for
//! everybody on this machine, which is why it is not there unless it is asked for, and why no other address can be.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::metrics::{CONTENT_TYPE, exposition};
use crate::sample::Sampler;

/// Name of the Unix socket in the run directory.
pub const SOCKET: &str = "metrics.sock";
/// Longest request.
const REQUEST_BYTES_MAX: usize = 8192;
/// Connections at a time.
const CONNECTIONS_MAX: usize = 16;
/// For a request to come, and an answer to go.
const DEADLINE: Duration = Duration::from_secs(5);

/// Why nothing is served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Not everybody's business.
    #[error(
        "{address} is not a loopback address: metrics are served to this machine only (127.0.0.1 or ::1); a proxy in front can do more"
    )]
    NotLoopback {
        /// What was asked.
        address: SocketAddr,
    },
    /// A socket cannot be made.
    #[error("{place} cannot be listened on: choose another, or end who does")]
    Listen {
        /// Where.
        place: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What somebody asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Metrics,
    Health,
    Ready,
}

/// An answer.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    status: &'static str,
    content_type: &'static str,
    body: String,
}

impl Answer {
    fn text(status: &'static str, body: impl Into<String>) -> Self {
        Self { status, content_type: "text/plain; charset=utf-8", body: body.into() }
    }

    fn bytes(&self, head_only: bool) -> Vec<u8> {
        let Self { status, content_type, body } = self;
        let len = body.len();
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len}\r\nConnection: close\r\n\r\n"
        );
        let body = if head_only { "" } else { body };
        [head.as_bytes(), body.as_bytes()].concat()
    }
}

/// The first line of a request.
fn parse(request: &str) -> Result<(Asked, bool), Answer> {
    let mut words = request.lines().next().unwrap_or_default().split(' ');
    let (method, target, version) = (words.next(), words.next(), words.next());
    if !version.is_some_and(|version| version.starts_with("HTTP/1.")) {
        return Err(Answer::text("400 Bad Request", "Not a request of HTTP/1\n"));
    }
    let head_only = match method {
        Some("GET") => false,
        Some("HEAD") => true,
        _ => return Err(Answer::text("405 Method Not Allowed", "Only GET and HEAD\n")),
    };
    let path = target.unwrap_or_default().split('?').next().unwrap_or_default();
    match path {
        "/metrics" => Ok((Asked::Metrics, head_only)),
        "/healthz" => Ok((Asked::Health, head_only)),
        "/readyz" => Ok((Asked::Ready, head_only)),
        _ => Err(Answer::text("404 Not Found", "There are /metrics, /healthz and /readyz\n")),
    }
}

/// See the module head.
pub struct Server {
    run_dir: PathBuf,
    /// Device and inode of the socket's name.
    name: Option<(u64, u64)>,
    unix: UnixListener,
    tcp: Option<TcpListener>,
    /// One that is connected, from scrape to scrape.
    sampler: Mutex<Option<Sampler>>,
    connections: AtomicUsize,
}

impl Server {
    /// Listens in the run directory, and on a loopback address.
    ///
    /// # Errors
    /// `NotLoopback`, `Listen`.
    pub fn bind(run_dir: &Path, address: Option<SocketAddr>) -> Result<Self, ServeError> {
        if let Some(address) = address.filter(|address| !address.ip().is_loopback()) {
            return Err(ServeError::NotLoopback { address });
        }
        let path = run_dir.join(SOCKET);
        let unix =
            bind_unix(&path).map_err(|source| ServeError::Listen { place: path.display().to_string(), source })?;
        let tcp = address
            .map(|address| {
                TcpListener::bind(address).map_err(|source| ServeError::Listen { place: address.to_string(), source })
            })
            .transpose()?;
        let (sampler, connections) = (Mutex::new(None), AtomicUsize::new(0));
        let name = identity(&path);
        Ok(Self { run_dir: run_dir.to_owned(), name, unix, tcp, sampler, connections })
    }

    /// Where it listens on TCP.
    pub fn address(&self) -> Option<SocketAddr> {
        self.tcp.as_ref().and_then(|tcp| tcp.local_addr().ok())
    }

    /// Serves until `stop` is readable or one of the listeners fails.
    ///
    /// # Errors
    /// Of poll.
    pub fn run(&self, stop: Option<&dyn std::os::fd::AsFd>) -> io::Result<()> {
        use rustix::event::{PollFd, PollFlags, poll};
        self.unix.set_nonblocking(true)?;
        self.tcp.as_ref().map_or(Ok(()), |tcp| tcp.set_nonblocking(true))?;
        std::thread::scope(|scope| {
            loop {
                let mut entries = vec![PollFd::new(&self.unix, PollFlags::IN)];
                entries.extend(self.tcp.iter().map(|tcp| PollFd::new(tcp, PollFlags::IN)));
                if let Some(stop) = stop {
                    entries.push(PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN));
                }
                match poll(&mut entries, None) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(errno) => return Err(errno.into()),
                }
                if stop.is_some() && entries.last().is_some_and(|entry| !entry.revents().is_empty()) {
                    return Ok(());
                }
                if let Ok((stream, _)) = self.unix.accept() {
                    let ready = stream.set_nonblocking(false).and_then(|()| timeouts_unix(&stream));
                    if ready.is_ok() && self.take_place() {
                        scope.spawn(move || self.converse(stream));
                    }
                }
                if let Some(Ok((stream, _))) = self.tcp.as_ref().map(TcpListener::accept) {
                    let ready = stream.set_nonblocking(false).and_then(|()| timeouts_tcp(&stream));
                    if ready.is_ok() && self.take_place() {
                        scope.spawn(move || self.converse(stream));
                    }
                }
            }
        })
    }

    /// One more than can be served is not: its connection is closed.
    fn take_place(&self) -> bool {
        let taken = self.connections.fetch_add(1, Ordering::Relaxed);
        if taken >= CONNECTIONS_MAX {
            self.connections.fetch_sub(1, Ordering::Relaxed);
        }
        taken < CONNECTIONS_MAX
    }

    fn converse(&self, mut stream: impl Read + Write) {
        let (answer, head_only) = match read_request(&mut stream).map(|request| parse(&request)) {
            None => (None, false),
            Some(Err(answer)) => (Some(answer), false),
            Some(Ok((asked, head_only))) => (Some(self.answer(asked)), head_only),
        };
        if let Some(Err(error)) = answer.map(|answer| stream.write_all(&answer.bytes(head_only))) {
            tracing::debug!(%error, "Who asked is gone");
        }
        self.connections.fetch_sub(1, Ordering::Relaxed);
    }

    fn answer(&self, asked: Asked) -> Answer {
        let mut kept = match self.sampler.lock() {
            Ok(kept) => kept,
            Err(poisoned) => poisoned.into_inner(),
        };
        let sampler = match kept.take() {
            Some(sampler) => Ok(sampler),
            None => Sampler::connect(Some(&self.run_dir)),
        };
        let sampled = sampler.and_then(|mut sampler| {
            let sample = sampler.sample()?;
            Ok((sampler, sample))
        });
        let sample = match sampled {
            Ok((sampler, sample)) => {
                *kept = Some(sampler);
                sample
            }
            Err(error) => return Answer::text("503 Service Unavailable", format!("{error}\n")),
        };
        match asked {
            Asked::Metrics => Answer { status: "200 OK", content_type: CONTENT_TYPE, body: exposition(&sample) },
            Asked::Health => Answer::text("200 OK", "The supervisor answers\n"),
            Asked::Ready => match sample.not_ready() {
                waiting if waiting.is_empty() => Answer::text("200 OK", "Every service is ready\n"),
                waiting => Answer::text("503 Service Unavailable", format!("{}\n", waiting.join("\n"))),
            },
        }
    }
}

impl Drop for Server {
    /// Leaves no name behind, unless it is another one's by now.
    fn drop(&mut self) {
        let path = self.run_dir.join(SOCKET);
        if self.name.is_some() && identity(&path) == self.name {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
}

/// Takes the place of one that is there: it is left by a process that is gone, or that ends now. It is there for this account only before
/// anybody can connect.
fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    let own = path.with_extension(format!("{}.new", std::process::id()));
    let _ = std::fs::remove_file(&own);
    let listener = UnixListener::bind(&own)?;
    std::fs::set_permissions(&own, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&own, path)?;
    Ok(listener)
}

fn timeouts_unix(stream: &std::os::unix::net::UnixStream) -> io::Result<()> {
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.set_write_timeout(Some(DEADLINE))
}

fn timeouts_tcp(stream: &std::net::TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.set_write_timeout(Some(DEADLINE))
}

/// Up to the empty line; `None`: too long, too slow, or not text.
fn read_request(stream: &mut impl Read) -> Option<String> {
    let (mut request, mut part) = (Vec::new(), [0; 1024]);
    let until = Instant::now() + DEADLINE;
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let len = stream.read(&mut part).ok().filter(|len| *len > 0)?;
        request.extend_from_slice(&part[..len]);
        if request.len() > REQUEST_BYTES_MAX || Instant::now() > until {
            return None;
        }
    }
    String::from_utf8(request).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_paths_are_answered_and_nothing_else() {
        assert_eq!(parse("GET /metrics HTTP/1.1\r\n"), Ok((Asked::Metrics, false)));
        assert_eq!(parse("HEAD /readyz?verbose HTTP/1.0\r\n"), Ok((Asked::Ready, true)));
        let status = |request: &str| parse(request).map_err(|answer| answer.status[..3].to_owned());
        for (request, code) in [
            ("GET / HTTP/1.1", "404"),
            ("GET /../metrics HTTP/1.1", "404"),
            ("POST /metrics HTTP/1.1", "405"),
            ("GET /metrics", "400"),
            ("GET /metrics SPDY/3", "400"),
            ("", "400"),
        ] {
            assert_eq!(status(request), Err(code.to_owned()), "{request}");
        }
    }

    #[test]
    fn a_request_is_bounded() {
        assert_eq!(read_request(&mut &b"GET / HTTP/1.1\r\n\r\n"[..]).as_deref(), Some("GET / HTTP/1.1\r\n\r\n"));
        assert_eq!(read_request(&mut &vec![b'x'; 1 << 20][..]), None);
        assert_eq!(read_request(&mut &b"GET / HTTP/1.1\r\n"[..]), None, "it ends too early");
    }

    #[test]
    fn only_this_machine_is_served() {
        let dir = tempfile::tempdir().unwrap();
        let refused = Server::bind(dir.path(), Some("0.0.0.0:0".parse().unwrap())).map(drop);
        assert!(matches!(refused, Err(ServeError::NotLoopback { .. })));
        let server = Server::bind(dir.path(), Some("127.0.0.1:0".parse().unwrap())).unwrap();
        assert!(server.address().is_some_and(|address| address.port() != 0));
        // A second one takes over, and the first one leaves it alone.
        let second = Server::bind(dir.path(), None).unwrap();
        drop(server);
        let mode = std::fs::metadata(dir.path().join(SOCKET)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(second);
        assert!(!dir.path().join(SOCKET).exists());
    }

    #[test]
    fn without_a_system_health_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::bind(dir.path(), None).unwrap();
        let answer = server.answer(Asked::Health);
        assert!(answer.status.starts_with("503") && answer.body.contains("uhmm up"), "{answer:?}");
    }
}
