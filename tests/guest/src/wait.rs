//! Waiting for a child with a deadline, without polling: its pidfd becomes readable when it ends.

use std::io;
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// Waits until the child has ended, or kills it at the deadline and answers `None`.
///
/// # Errors
/// The kernel's, when the child cannot be watched, killed or reaped.
pub fn wait_or_kill(child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&left)) {
            Ok(0) => {
                child.kill()?;
                child.wait()?;
                return Ok(None);
            }
            Ok(_) => return child.wait().map(Some),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_child_that_ends_is_reaped_and_one_that_does_not_is_killed() {
        let mut quick = Command::new("false").spawn().unwrap();
        assert_eq!(wait_or_kill(&mut quick, Duration::from_secs(60)).unwrap().unwrap().code(), Some(1));
        let mut slow = Command::new("sleep").arg("600").spawn().unwrap();
        assert!(wait_or_kill(&mut slow, Duration::from_millis(20)).unwrap().is_none());
        assert!(slow.try_wait().unwrap().is_some());
    }
}
