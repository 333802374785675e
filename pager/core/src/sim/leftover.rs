//! What a dead pager has asked of a driver that lives: the driver goes on with it until it logs in at the next pager, whole or in part, whatever
//! the next pager does meanwhile with frames and pages.

use super::execute::Pending;
use super::machine::World;
use crate::{Action, DeviceId, RegionId};

/// A write to frames that may still happen.
#[derive(Clone, Debug)]
pub(super) struct Leftover {
    device: DeviceId,
    frame: u32,
    values: Vec<u64>,
}

impl World {
    /// A pending action of a pager that has just died. What it would have read was read: the dead pager had it put into staging.
    pub(super) fn leave_over(&mut self, pending: &Pending) {
        // Asked of a driver that has died itself.
        if pending.fail {
            return;
        }
        let taken = pending.taken.as_ref().map(|taken| taken.iter().map(|(_, bytes)| *bytes).collect());
        let values = pending.early.clone().or(taken).unwrap_or_else(|| self.source(&pending.action));
        let privates: Vec<_> = self.regions.keys().copied().filter(|region| self.is_private(*region)).collect();
        let private = |region: RegionId| privates.contains(&region);
        let zeros = |count: u32| vec![0; count as usize];
        let mut leave = |device: DeviceId, frame: u32, values: Vec<u64>| {
            self.leftovers.push(Leftover { device, frame, values });
        };
        match &pending.action {
            // The agent was not asked in time: nothing was taken out.
            Action::CopyOut { region, .. } if pending.taken.is_none() && private(*region) => {}
            Action::CopyOut { device, frame, .. } => leave(*device, *frame, values),
            Action::CopyAcross { to, frame, .. } => leave(*to, *frame, values),
            Action::ZeroFrames { device, frame, count, .. } => leave(*device, *frame, zeros(*count)),
            Action::Scrub { device, runs, .. } => {
                runs.iter().for_each(|(frame, count)| leave(*device, *frame, zeros(*count)));
            }
            _ => {}
        }
    }

    /// The driver has stopped with it, at some point.
    pub(super) fn end_leftovers(&mut self, device: DeviceId) {
        let (mine, others) = std::mem::take(&mut self.leftovers).into_iter().partition(|left| left.device == device);
        self.leftovers = others;
        let mine: Vec<Leftover> = mine;
        for Leftover { frame, values, .. } in mine {
            let count = self.rng.below(values.len() as u64 + 1) as usize;
            let frames = &mut self.devices[usize::from(device.0)].frames[frame as usize..];
            frames[..count].copy_from_slice(&values[..count]);
        }
    }
}
