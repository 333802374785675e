//! `uhmm status` and `uhmm stats`.

use std::path::Path;

use uhmm_kernel_hook::confine::Step;
use uhmm_sdk::{ClaimShare, Claims, Metric, Operator, RegionStatus, ServiceStatus};

const BAR_CELLS: u64 = 32;

/// `uhmm status`: services, then regions with a residency bar each.
pub fn status(run_dir: &Path) -> anyhow::Result<()> {
    let mut operator = Operator::connect(Some(run_dir))?;
    let services = operator.status()?;
    let sandboxes = operator.stats("supervisor")?;
    print!("{}", services_table(&services, &sandboxes));
    let pager_ready = services.iter().any(|service| service.name == "pager" && service.state == "ready");
    if !pager_ready {
        println!("\nThe pager is not ready: regions cannot be listed now");
        return Ok(());
    }
    let regions = operator.regions()?;
    print!("\n{}", regions_table(&regions));
    print!("{}", claims_table(&operator.claims()?));
    Ok(())
}

/// Who was given what while the system runs; nothing where nobody was.
fn claims_table(claims: &Claims) -> String {
    let mut text = String::new();
    for claim in &claims.claims {
        if text.is_empty() {
            text = format!("\n{:<42} {:<32} {:>9}  SHARES (USED OF MIB)\n", "CLAIM", "NAME", "PROCESSES");
        }
        let name = |id: u8| claims.devices.iter().find(|device| device.device == id).map_or("?", |device| &device.name);
        let share = |share: &ClaimShare| {
            format!("{} {}/{}", name(share.device), share.used_bytes.div_ceil(1 << 20), share.bytes >> 20)
        };
        let shares: Vec<String> = claim.shares.iter().map(share).collect();
        text += &format!("{:<42} {:<32} {:>9}  {}\n", claim.id, claim.name, claim.spaces, shares.join(", "));
    }
    text
}

/// What is not in force for a service; `whole`, or `off` as its manifest says.
fn sandbox_of(service: &str, sandboxes: &[Metric]) -> String {
    // Whether refused calls are told, limits and another user do not make it less whole.
    let counts = |step: &Step| !matches!(step, Step::Listener | Step::Limits | Step::Account);
    let name = format!("sandbox_{service}");
    let Some(found) = sandboxes.iter().find(|metric| metric.name == name) else { return "-".to_owned() };
    if found.value == 0 {
        return "off".to_owned();
    }
    // The holder needs no folders of its own, and a service may be given the network.
    let lost = Step::ALL.into_iter().filter(counts).filter(|step| found.value & 1 << (*step as u32) == 0);
    let lost: Vec<&str> =
        lost.filter(|step| !(service == "holder" && *step == Step::Folders)).map(Step::name).collect();
    if lost.is_empty() { "whole".to_owned() } else { format!("no {}", lost.join(",")) }
}

fn services_table(services: &[ServiceStatus], sandboxes: &[Metric]) -> String {
    let mut text = format!(
        "{:<16} {:<9} {:>8} {:>5} {:>10} {:>7} {:>12} {:>6}  {:<12} {}\n",
        "SERVICE", "STATE", "PID", "INC", "UPTIME", "MISSED", "RECOVERY", "VAULT", "SANDBOX", "LAST EXIT"
    );
    for service in services {
        let pid = number(service.pid);
        let recovery =
            if service.incarnation > 1 { format!("{} ms", service.last_recovery_ms) } else { "-".to_owned() };
        text += &format!(
            "{:<16} {:<9} {:>8} {:>5} {:>8} s {:>7} {:>12} {:>6}  {:<12} {}\n",
            service.name,
            service.state,
            pid,
            service.incarnation,
            service.uptime_ms / 1000,
            service.missed_heartbeats,
            recovery,
            service.vault_entries,
            sandbox_of(&service.name, sandboxes),
            service.last_exit,
        );
    }
    text
}

/// A process that the services cannot see (it is in a container of its own) has no number there.
fn number(pid: u32) -> String {
    match pid {
        0 => "-".to_owned(),
        u32::MAX => "outside".to_owned(),
        pid => pid.to_string(),
    }
}

fn regions_table(regions: &[RegionStatus]) -> String {
    if regions.is_empty() {
        return "No process has memory under management\n".to_owned();
    }
    let mut text = format!(
        "{:<8} {:<8} {:<16} {:>10}  WHERE  (s system, 0-7 device, ~ moving, . untouched, ! lost)\n",
        "PID", "REGION", "ADDRESS", "MIB"
    );
    for region in regions {
        let mib = region.page_count as f64 * 4096.0 / f64::from(1 << 20);
        let address = format!("{:#x}", region.addr);
        text += &format!(
            "{:<8} {:<8} {:<16} {:>10.1}  [{}]\n",
            number(region.pid),
            region.region,
            address,
            mib,
            bar(region)
        );
    }
    text
}

/// One cell stands for its share of the pages; whatever exists at all gets at least one cell.
fn bar(region: &RegionStatus) -> String {
    let mut parts = vec![('s', region.system_pages)];
    parts.extend(region.device_pages.iter().enumerate().map(|(id, pages)| (char::from(b'0' + id as u8), *pages)));
    parts.extend([('~', region.moving_pages), ('!', region.poisoned_pages), ('.', region.absent_pages)]);
    parts.retain(|(_, pages)| *pages > 0);
    let total = region.page_count.max(1);
    let mut cells: Vec<(char, u64)> =
        parts.iter().map(|(mark, pages)| (*mark, (pages * BAR_CELLS / total).max(1))).collect();
    let sum: u64 = cells.iter().map(|(_, cells)| cells).sum();
    if let Some(largest) = cells.iter_mut().max_by_key(|(_, cells)| *cells) {
        largest.1 = (largest.1 + BAR_CELLS).saturating_sub(sum);
    }
    cells.iter().map(|(mark, cells)| mark.to_string().repeat(*cells as usize)).collect()
}

/// `uhmm stats [--json]`: every counter of every service that answers.
pub fn stats(run_dir: &Path, json: bool) -> anyhow::Result<()> {
    let mut operator = Operator::connect(Some(run_dir))?;
    let names: Vec<String> = operator.status()?.into_iter().map(|service| service.name).collect();
    let mut all = serde_json::Map::new();
    for name in std::iter::once("supervisor".to_owned()).chain(names) {
        match operator.stats(&name) {
            Ok(metrics) => {
                let values = metrics.into_iter().map(|metric| (metric.name, metric.value.into())).collect();
                all.insert(name, serde_json::Value::Object(values));
            }
            Err(error) => {
                all.insert(name, serde_json::json!({ "error": error.to_string() }));
            }
        }
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(());
    }
    for (service, values) in &all {
        println!("{service}");
        for (name, value) in values.as_object().into_iter().flatten() {
            println!("  {name:<32} {value}");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(system_pages: u64, on_device_1: u64, absent_pages: u64) -> RegionStatus {
        let mut device_pages = vec![0; 8];
        device_pages[1] = on_device_1;
        RegionStatus {
            space: 1,
            pid: 42,
            region: 7,
            addr: 0x7000_0000,
            page_count: system_pages + on_device_1 + absent_pages,
            system_pages,
            absent_pages,
            moving_pages: 0,
            poisoned_pages: 0,
            device_pages,
        }
    }

    #[test]
    fn a_bar_has_all_its_cells_and_shows_the_smallest_part() {
        for (system, device, absent) in [(1, 1_000_000, 0), (5, 5, 5), (0, 3, 0), (1, 1, 1_000_000)] {
            let bar = bar(&region(system, device, absent));
            assert_eq!(bar.chars().count() as u64, BAR_CELLS, "{bar}");
            assert_eq!(bar.contains('s'), system > 0, "{bar}");
            assert_eq!(bar.contains('1'), device > 0, "{bar}");
        }
    }

    #[test]
    fn what_is_not_in_force_is_named() {
        let all = Step::ALL.into_iter().fold(0, |all, step| all | 1u64 << (step as u32));
        let metric = |name: &str, value: u64| Metric { name: name.to_owned(), value };
        let without = |step: Step| all & !(1 << (step as u32));
        let metrics = [
            metric("sandbox_a", all),
            metric("sandbox_b", 0),
            metric("sandbox_c", without(Step::Files)),
            metric("sandbox_holder", without(Step::Folders)),
        ];
        let shown = ["a", "b", "c", "holder", "d"].map(|name| sandbox_of(name, &metrics));
        assert_eq!(shown, ["whole", "off", "no files", "whole", "-"]);
    }

    #[test]
    fn nothing_under_management_is_said_in_words() {
        assert!(regions_table(&[]).contains("No process"));
    }
}
