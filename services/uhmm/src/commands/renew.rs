//! `uhmm renew`: after an upgrade every process is an old one still. A service that dies is started from the file of today, and nobody loses
//! anything by it; so each of them is killed, and the next one when it serves again.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::bail;
use uhmm_sdk::{Operator, ServiceStatus};

/// From a service's end to its next incarnation.
const PATIENCE: Duration = Duration::from_secs(60);
/// The supervisor tells nobody when a service is ready: it is asked.
const PAUSE: Duration = Duration::from_millis(10);

/// The holder last: until then it has what every other one needs.
pub fn renew(run_dir: &Path) -> anyhow::Result<()> {
    let mut operator = Operator::connect(Some(run_dir))?;
    for service in operator.status()? {
        if service.pid == 0 {
            println!("{} does not run ({}): the next start is from the new file", service.name, service.state);
            continue;
        }
        let killed = operator.kill(&service.name)?;
        let now = wait_for(&mut operator, &service.name, killed.incarnation)?;
        println!(
            "{}: incarnation {} (pid {}) after {} (pid {})",
            service.name, now.incarnation, now.pid, killed.incarnation, killed.pid
        );
    }
    Ok(())
}

fn wait_for(operator: &mut Operator, name: &str, before: u32) -> anyhow::Result<ServiceStatus> {
    let until = Instant::now() + PATIENCE;
    loop {
        let found = operator.status()?.into_iter().find(|service| service.name == name);
        let Some(found) = found else { bail!("{name} is not in the plan any more: look at `uhmm status`") };
        if found.state == "ready" && found.incarnation > before {
            return Ok(found);
        }
        if found.state == "held" || Instant::now() > until {
            bail!(
                "{name} does not come back ({}: {}): the others were left as they are; look at its log, then try again",
                found.state,
                found.last_exit
            );
        }
        std::thread::sleep(PAUSE);
    }
}
