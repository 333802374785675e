//! First and last contact: which devices there are, of what kind their memory is, and that none of it was lost.

use uhmm_sdk::Session;

use crate::case::{CaseArgs, CaseResult, During, Failure, Outcome, Registry, ensure, guarded};
use crate::ctx::{BUF, Ctx, PMD};
use crate::mem::PAGE;
use crate::runner::Found;

pub(super) fn register(list: &mut Registry) {
    list.one("Z01_device_memory_is_whole", device_memory_is_whole);
}

/// See [`crate::runner::WARM_UP`]; the role names the driver, the devices are candidates.
pub(crate) fn warm_up(args: &CaseArgs) -> Outcome {
    let mut found = None;
    let result = guarded(|| {
        found = Some(first_contact(args)?);
        Ok(())
    });
    let mut outcome = Outcome::from(result);
    if let Some(found) = found {
        outcome.why = serde_json::to_string(&found).unwrap_or_default();
    }
    outcome
}

fn first_contact(args: &CaseArgs) -> CaseResult<Found> {
    let driver = args.role.first().map(String::as_str).unwrap_or_default();
    let session = Session::connect(Some(&args.run_dir)).during("Connect")?;
    let (mut devices, mut other_devices) = (Vec::new(), Vec::new());
    for name in &args.devices {
        let device = session.device(name).during(&format!("Open {name}"))?;
        let of_driver = device.info().driver == driver;
        if of_driver { &mut devices } else { &mut other_devices }.push(name.clone());
    }
    drop(session);
    let mut found = Found { devices, other_devices, coherent: false, capacity_pages: 0 };
    if found.devices.is_empty() {
        return Ok(found);
    }
    let ctx = Ctx::open(CaseArgs { devices: found.devices.clone(), role: Vec::new(), ..args.clone() })?;
    for device in 0..ctx.device_count() {
        let len = ctx.device(device)?.info().memory_bytes.min(2 * PMD);
        let mem = ctx.patterned(len, 1)?;
        ctx.all_to_device(device, &mem)?;
        ctx.sees_all(device, &mem, 1)?;
        mem.expect_all(1)?;
        // Read by the CPU and still on the device: that is what coherent means.
        let mem = ctx.allocated(len, Some(2))?;
        ctx.all_to_device(device, &mem)?;
        mem.expect_all(2)?;
        found.coherent = ctx.residency(&mem, 0, len)?.all_device_pages() > 0;
        ctx.to_home(&mem, 0, len)?;
        mem.expect_all(2)?;
    }
    let len = ctx.device(0)?.info().memory_bytes.min(PMD);
    let region = ctx.session.allocate(len).during("Allocate")?;
    ctx.migrate(region.addr(), len, ctx.device(0)?.target()).during("Migrate")?;
    drop(region);
    found.capacity_pages = capacity_pages(&ctx)?;
    Ok(found)
}

/// How many pages are on the first device after as much as its memory was sent there. Not more: eviction makes room ahead, and how much of that is
/// used when the last page has come depends on how fast the device is.
fn capacity_pages(ctx: &Ctx) -> CaseResult<u64> {
    let len = ctx.device(0)?.info().memory_bytes;
    let mem = if len < BUF { ctx.patterned(len, 99)? } else { ctx.huge(len, Some(99))? };
    ctx.migrate(mem.addr(), len, ctx.device(0)?.target()).during("Fill the device")?;
    let pages = ctx.settled_residency(&mem, 0, len)?.all_device_pages();
    mem.expect_all(99)?;
    Ok(pages)
}

/// As many pages fit as did in the beginning: no case has left a frame behind that nobody owns.
fn device_memory_is_whole(ctx: &Ctx) -> CaseResult {
    let Some(before) = ctx.args.role.first().and_then(|word| word.parse::<u64>().ok()) else {
        return Err(Failure::Failed("The runner has not said how much fits".into()));
    };
    let now = capacity_pages(ctx)?;
    // Where eviction stops may differ by a few chunks; a lost frame shows after many cases, so a whole chunk is allowed. The same where
    // the last chunk is not a whole one (a page of it bears a driver's mark): room for it is made by a whole one.
    let exact = ctx.undisturbed() && ctx.device(0)?.info().memory_bytes.is_multiple_of(PMD);
    let slack = if exact { 0 } else { PMD / PAGE };
    ensure!(now + slack >= before, "{now} pages fit on the device where {before} did in the beginning");
    Ok(())
}
