//! What the kubelet calls: registration and the DRA plugin, both as gRPC on Unix sockets. The two versions of the plugin have the same messages.

use std::convert::Infallible;
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;

use hyper::body::Incoming;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::UnixStream;
use tonic::body::Body;
use tonic::server::{Grpc, UnaryService};
use tonic::{Code, Status};
use tonic_prost::ProstCodec;

use crate::plugin::Plugin;
use crate::wire;

const REGISTRATION: &str = "pluginregistration.Registration";
/// As the kubelet calls a version, and the service that it means.
const PLUGINS: [(&str, &str); 2] = [
    ("v1.DRAPlugin", "k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin"),
    ("v1beta1.DRAPlugin", "k8s.io.kubelet.pkg.apis.dra.v1beta1.DRAPlugin"),
];

type Later<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// A function as tonic wants it.
struct Unary<F>(Option<F>);

impl<Q, A, F> UnaryService<Q> for Unary<F>
where
    F: FnOnce(Q) -> A + Send + 'static,
    Q: Send + 'static,
    A: Send + 'static,
{
    type Response = A;
    type Future = Later<Result<tonic::Response<A>, Status>>;

    /// On a thread of its own: what is done there waits for disks and sockets.
    fn call(&mut self, request: tonic::Request<Q>) -> Self::Future {
        let function = self.0.take();
        Box::pin(async move {
            let function = function.ok_or_else(|| Status::internal("Called twice"))?;
            let answer = tokio::task::spawn_blocking(move || function(request.into_inner())).await;
            answer.map(tonic::Response::new).map_err(|error| Status::internal(error.to_string()))
        })
    }
}

async fn unary<Q, A>(request: Request<Incoming>, function: impl FnOnce(Q) -> A + Send + 'static) -> Response<Body>
where
    Q: prost::Message + Default + Send + 'static,
    A: prost::Message + Send + 'static,
{
    Grpc::new(ProstCodec::<A, Q>::new()).unary(Unary(Some(function)), request).await
}

/// One of the two sockets.
#[derive(Clone)]
pub enum Door {
    /// Where the kubelet learns of us.
    Registration {
        /// The driver's name.
        name: String,
        /// Where the kubelet finds the other socket.
        endpoint: PathBuf,
    },
    /// Where it asks for claims.
    Plugin(Arc<Plugin>),
}

impl Door {
    async fn answer(self, request: Request<Incoming>) -> Response<Body> {
        let path = request.uri().path().to_owned();
        let (service, method) = path.trim_start_matches('/').split_once('/').unwrap_or_default();
        match (self, method) {
            (Self::Registration { name, endpoint }, "GetInfo") if service == REGISTRATION => {
                let info = move |_: wire::InfoRequest| wire::PluginInfo {
                    r#type: "DRAPlugin".to_owned(),
                    name,
                    endpoint: endpoint.to_string_lossy().into_owned(),
                    supported_versions: PLUGINS.map(|(version, _)| version.to_owned()).to_vec(),
                };
                unary(request, info).await
            }
            (Self::Registration { .. }, "NotifyRegistrationStatus") if service == REGISTRATION => {
                unary(request, registered).await
            }
            (Self::Plugin(plugin), "NodePrepareResources") if is_plugin(service) => {
                let prepare = move |request: wire::ClaimsRequest| wire::PrepareResponse {
                    claims: plugin.prepare(&request.claims),
                };
                unary(request, prepare).await
            }
            (Self::Plugin(plugin), "NodeUnprepareResources") if is_plugin(service) => {
                let unprepare = move |request: wire::ClaimsRequest| wire::UnprepareResponse {
                    claims: plugin.unprepare(&request.claims),
                };
                unary(request, unprepare).await
            }
            _ => Status::new(Code::Unimplemented, format!("{path} is not served here")).into_http(),
        }
    }

    /// All calls of one connection.
    pub async fn serve(self, stream: UnixStream) {
        let service = hyper::service::service_fn(move |request| {
            let door = self.clone();
            async move { Ok::<_, Infallible>(door.answer(request).await) }
        });
        let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        if let Err(error) = connection.serve_connection(TokioIo::new(stream), service).await {
            tracing::debug!(%error, "A connection has ended");
        }
    }
}

fn is_plugin(service: &str) -> bool {
    PLUGINS.iter().any(|(_, name)| *name == service)
}

fn registered(status: wire::RegistrationStatus) -> wire::RegistrationStatusResponse {
    if status.plugin_registered {
        tracing::info!("The kubelet has registered this driver");
    } else {
        tracing::error!(error = status.error, "The kubelet does not register this driver");
    }
    wire::RegistrationStatusResponse {}
}
