//! Messages in: who may ask what. Each call either answers at once or leaves a note of who waits.

use uhmm_ipc::message::{Call, ErrorCode, Reply, Role, TraceId, WireError, common, pager};
use uhmm_ipc::{CallId, ConnId};
use uhmm_kernel_hook::AddrRange;
use uhmm_kit::record;
use uhmm_pager_core::Backing;

use crate::clients::Opening;
use crate::create::Wanted;
use crate::home::Whose;
use crate::requests::FaultKind;
use crate::service::Pager;

/// An answer now, or `None` when it comes later.
pub(crate) type Answer = Option<Result<pager::Reply, WireError>>;

pub(crate) fn refuse(code: ErrorCode, text: impl Into<String>) -> Answer {
    Some(Err(WireError::new(code, text)))
}

impl Pager {
    pub(crate) fn on_call(&mut self, conn: ConnId, call: CallId, trace: TraceId, body: Call) {
        let answer = match body {
            Call::Common(common::Call::Stats) => {
                Some(Ok(Reply::Common(common::Reply::Stats(record::metrics(|each| self.tell(each))))))
            }
            Call::Pager(request) => {
                let answer = self.on_pager_call(conn, call, trace, request);
                answer.map(|result| result.map(Reply::Pager))
            }
            _ => Some(Err(WireError::new(ErrorCode::Protocol, "Not a call of the pager interface"))),
        };
        if let Some(answer) = answer {
            if let Err(error) = &answer {
                tracing::info!(request = trace.0, %error, "Call refused");
            }
            self.service.reactor.reply(conn, call, answer);
        }
    }

    fn on_pager_call(&mut self, conn: ConnId, call: CallId, trace: TraceId, request: pager::Call) -> Answer {
        let Some(session) = self.sessions.get(&conn) else {
            return refuse(ErrorCode::Protocol, "The connection is gone");
        };
        let role = session.peer.role;
        if !may_ask(role, &request) {
            return refuse(ErrorCode::Permission, format!("A {role:?} may not make this call to the pager"));
        }
        match request {
            pager::Call::OpenSpace { nonce, uffd, full, sentinel_addr, agent, claim } => {
                self.open_space(conn, call, Opening { nonce, uffd, full, sentinel_addr, agent, claim })
            }
            pager::Call::AttachSpace { space, token, agent } => self.attach_space(conn, call, space, &token, agent),
            pager::Call::CloseSpace => self.close_space(conn, call),
            pager::Call::CreateRegion { addr, len_bytes, memory } => {
                let (backing, file) = (Backing::Shared, Some(memory));
                self.make_region(conn, call, Wanted { addr, len_bytes, backing, file, offset_bytes: 0 })
            }
            pager::Call::AdoptRegion { addr, len_bytes } => {
                let backing = Backing::Private;
                self.make_region(conn, call, Wanted { addr, len_bytes, backing, file: None, offset_bytes: 0 })
            }
            pager::Call::AttachFile { addr, len_bytes, file, offset_bytes } => {
                let (backing, file) = (Backing::File, Some(file));
                self.make_region(conn, call, Wanted { addr, len_bytes, backing, file, offset_bytes })
            }
            pager::Call::FreeRegion { region } => self.free_region(conn, call, region),
            pager::Call::ReleaseRange { addr, len_bytes } => self.release_range(conn, call, addr, len_bytes),
            pager::Call::Migrate { addr, len_bytes, target, prefetch, only } => {
                self.migrate(conn, call, trace, addr, len_bytes, target, prefetch, only)
            }
            pager::Call::Query { addr, len_bytes } => Some(self.query(conn, addr, len_bytes)),
            pager::Call::Advise { addr, len_bytes, advice } => self.advise(conn, call, addr, len_bytes, advice),
            pager::Call::QueryAttributes { addr, len_bytes } => Some(self.query_attributes(conn, addr, len_bytes)),
            pager::Call::Discard { addr, len_bytes } => self.discard(conn, call, addr, len_bytes),
            pager::Call::ProtectionChanged { addr, len_bytes } => self.protection_changed(conn, call, addr, len_bytes),
            pager::Call::Revalidate { addr, len_bytes } => self.revalidate(conn, call, addr, len_bytes),
            pager::Call::Evict { device, page_count } => self.evict(conn, call, device, page_count),
            pager::Call::HotRanges { device } => self.hot_ranges(conn, call, device),
            pager::Call::ReadTrace { since } => Some(self.read_trace(conn, since)),
            pager::Call::Inject { point, nth } => self.inject(conn, point, nth),
            pager::Call::FramesDone { id, done } => self.frames_answered(conn, id, done),
            pager::Call::AgentStarted { agent } => self.agent_started(conn, agent.as_ref()),
            pager::Call::DriverLogin { device, generation, frame_count, aperture, gate, copy_ring } => {
                Some(self.driver_login(conn, device, generation, frame_count, aperture, gate, copy_ring))
            }
            pager::Call::AttachTable { space, region, table } => Some(self.attach_table(conn, space, region, &table)),
            pager::Call::DeviceLost { device } => Some(self.device_lost(conn, device)),
            pager::Call::MirrorLogin => Some(self.mirror_login(conn)),
            pager::Call::OpenMirror { space, token, device } => Some(self.open_mirror(space, &token, device)),
            pager::Call::CloseMirror { space, device } => Some(self.close_mirror(space, device)),
            pager::Call::Lookup { space, addr } => Some(self.lookup(space, addr)),
            pager::Call::Resolve {
                space,
                region,
                first_page,
                page_count,
                fault_page,
                device,
                write,
                whole,
                exclusive,
            } => {
                let window = uhmm_pager_core::Pages { first: first_page, count: page_count };
                let kind = FaultKind { write, whole, exclusive };
                self.resolve(conn, call, trace, space, region, window, fault_page, device, kind)
            }
            pager::Call::InvalidateDone { id, late_mask } => {
                self.invalidate_done(id, late_mask);
                Some(Ok(pager::Reply::Done))
            }
            pager::Call::Home { pid, stay, process } => self.home(conn, call, (pid, process), stay),
            pager::Call::UserfaultfdDevice => Some(self.userfaultfd_device()),
            pager::Call::EmptyDevice { device, then } => self.empty_device(conn, call, device, then),
            pager::Call::Strip { region, cells } => Some(self.strip(region, cells)),
            pager::Call::MoveRange { pid, process, addr, len_bytes, target, rest } => {
                let who = Whose::Process { pid, name: process };
                let range = AddrRange { start: addr, len: len_bytes };
                self.move_range(conn, call, trace, (who, range), (target, rest))
            }
            pager::Call::MoveRegion { region, target } => self.move_region(conn, call, trace, region, target),
            pager::Call::SetClaim(claim) => Some(self.set_claim(&claim)),
            pager::Call::RemoveClaim { id } => Some(self.remove_claim(&id)),
            pager::Call::ListClaims { after } => Some(Ok(self.list_claims(&after))),
            pager::Call::ListRegions => Some(Ok(pager::Reply::Regions(self.list_regions()))),
        }
    }
}

/// Who may ask what of the pager.
fn may_ask(role: Role, request: &pager::Call) -> bool {
    match request {
        pager::Call::OpenSpace { .. }
        | pager::Call::AttachSpace { .. }
        | pager::Call::CloseSpace
        | pager::Call::CreateRegion { .. }
        | pager::Call::FreeRegion { .. }
        | pager::Call::Migrate { .. }
        | pager::Call::Query { .. }
        | pager::Call::Advise { .. }
        | pager::Call::AdoptRegion { .. }
        | pager::Call::AttachFile { .. }
        | pager::Call::ReleaseRange { .. }
        | pager::Call::Discard { .. }
        | pager::Call::ProtectionChanged { .. }
        | pager::Call::Revalidate { .. }
        | pager::Call::Evict { .. }
        | pager::Call::QueryAttributes { .. }
        | pager::Call::HotRanges { .. }
        | pager::Call::ReadTrace { .. }
        | pager::Call::Inject { .. }
        | pager::Call::FramesDone { .. }
        | pager::Call::AgentStarted { .. }
        | pager::Call::UserfaultfdDevice => role == Role::Client,
        pager::Call::DriverLogin { .. } | pager::Call::AttachTable { .. } | pager::Call::DeviceLost { .. } => {
            role == Role::Driver
        }
        pager::Call::MirrorLogin
        | pager::Call::OpenMirror { .. }
        | pager::Call::CloseMirror { .. }
        | pager::Call::Lookup { .. }
        | pager::Call::Resolve { .. }
        | pager::Call::InvalidateDone { .. } => role == Role::Mirror,
        // A client names no process but itself.
        pager::Call::Home { pid, .. } => role == if *pid == 0 { Role::Client } else { Role::Operator },
        pager::Call::ListRegions
        | pager::Call::EmptyDevice { .. }
        | pager::Call::Strip { .. }
        | pager::Call::SetClaim(_)
        | pager::Call::RemoveClaim { .. }
        | pager::Call::ListClaims { .. }
        | pager::Call::MoveRegion { .. }
        | pager::Call::MoveRange { .. } => role == Role::Operator,
    }
}
