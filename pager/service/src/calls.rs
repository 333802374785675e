//! Messages in: who may ask what. Each call either answers at once or leaves a note of who waits.

use uhmm_ipc::message::{Call, ErrorCode, Reply, Role, TraceId, WireError, common, pager};
use uhmm_ipc::{CallId, ConnId};

use crate::service::Pager;

/// An answer now, or `None` when it comes later.
pub(crate) type Answer = Option<Result<pager::Reply, WireError>>;

pub(crate) fn refuse(code: ErrorCode, text: impl Into<String>) -> Answer {
    Some(Err(WireError::new(code, text)))
}

impl Pager {
    pub(crate) fn on_call(&mut self, conn: ConnId, call: CallId, trace: TraceId, body: Call) {
        let answer = match body {
            Call::Common(common::Call::Stats) => Some(Ok(Reply::Common(common::Reply::Stats(self.metrics())))),
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
        let allowed = match &request {
            pager::Call::OpenSpace { .. }
            | pager::Call::AttachSpace { .. }
            | pager::Call::CloseSpace
            | pager::Call::CreateRegion { .. }
            | pager::Call::FreeRegion { .. }
            | pager::Call::Migrate { .. }
            | pager::Call::Query { .. }
            | pager::Call::Advise { .. } => role == Role::Client,
            pager::Call::DriverLogin { .. } | pager::Call::AttachTable { .. } => role == Role::Driver,
            pager::Call::MirrorLogin
            | pager::Call::OpenMirror { .. }
            | pager::Call::CloseMirror { .. }
            | pager::Call::Lookup { .. }
            | pager::Call::Resolve { .. }
            | pager::Call::InvalidateDone { .. } => role == Role::Mirror,
            pager::Call::ListRegions => role == Role::Operator,
        };
        if !allowed {
            return refuse(ErrorCode::Permission, format!("A {role:?} may not make this call to the pager"));
        }
        match request {
            pager::Call::OpenSpace { nonce, uffd, full } => self.open_space(conn, call, nonce, &uffd, full),
            pager::Call::AttachSpace { space, token } => self.attach_space(conn, space, &token),
            pager::Call::CloseSpace => self.close_space(conn),
            pager::Call::CreateRegion { addr, len_bytes, memory } => {
                self.create_region(conn, call, addr, len_bytes, memory)
            }
            pager::Call::FreeRegion { region } => self.free_region(conn, call, region),
            pager::Call::Migrate { addr, len_bytes, target } => {
                self.migrate(conn, call, trace, addr, len_bytes, target)
            }
            pager::Call::Query { addr, len_bytes } => Some(self.query(conn, addr, len_bytes)),
            pager::Call::Advise { addr, len_bytes, advice } => self.advise(conn, call, addr, len_bytes, advice),
            pager::Call::DriverLogin { device, generation, frame_count, aperture, gate, copy_ring } => {
                Some(self.driver_login(conn, device, generation, frame_count, aperture, gate, copy_ring))
            }
            pager::Call::AttachTable { space, region, table } => Some(self.attach_table(conn, space, region, &table)),
            pager::Call::MirrorLogin => Some(self.mirror_login(conn)),
            pager::Call::OpenMirror { space, token, device } => Some(self.open_mirror(space, &token, device)),
            pager::Call::CloseMirror { space, device } => Some(self.close_mirror(space, device)),
            pager::Call::Lookup { space, addr } => Some(self.lookup(space, addr)),
            pager::Call::Resolve { space, region, first_page, page_count, fault_page, device, write } => {
                let window = uhmm_pager_core::Pages { first: first_page, count: page_count };
                self.resolve(conn, call, trace, space, region, window, fault_page, device, write)
            }
            pager::Call::InvalidateDone { id, late_mask } => {
                self.invalidate_done(id, late_mask);
                Some(Ok(pager::Reply::Done))
            }
            pager::Call::ListRegions => Some(Ok(pager::Reply::Regions(self.list_regions()))),
        }
    }
}
