//! What the kubelet says and hears, as protocol buffers: plugin registration (`pluginregistration/v1`) and the DRA plugin (`dra/v1`, whose messages
//! `dra/v1beta1` has too). Written down by hand, with the numbers of the kubelet's own definitions, so that no build needs protoc.

use std::collections::HashMap;

/// Registration: nothing.
#[derive(Clone, PartialEq, prost::Message)]
pub struct InfoRequest {}

/// Who the plugin is.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PluginInfo {
    /// `DRAPlugin`.
    #[prost(string, tag = "1")]
    pub r#type: String,
    /// The driver's name.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Path of the plugin's socket.
    #[prost(string, tag = "3")]
    pub endpoint: String,
    /// Services of the plugin.
    #[prost(string, repeated, tag = "4")]
    pub supported_versions: Vec<String>,
}

/// What became of the registration.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RegistrationStatus {
    /// Whether it is one.
    #[prost(bool, tag = "1")]
    pub plugin_registered: bool,
    /// Why not.
    #[prost(string, tag = "2")]
    pub error: String,
}

/// Nothing.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RegistrationStatusResponse {}

/// One ResourceClaim.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Claim {
    /// Where it is.
    #[prost(string, tag = "1")]
    pub namespace: String,
    /// What it is called for ever.
    #[prost(string, tag = "2")]
    pub uid: String,
    /// What it is called now.
    #[prost(string, tag = "3")]
    pub name: String,
}

/// Of both calls.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ClaimsRequest {
    /// Which.
    #[prost(message, repeated, tag = "1")]
    pub claims: Vec<Claim>,
}

/// A device that a container is given.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Device {
    /// The claim's requests that it is for.
    #[prost(string, repeated, tag = "1")]
    pub request_names: Vec<String>,
    /// Its pool.
    #[prost(string, tag = "2")]
    pub pool_name: String,
    /// Its name there.
    #[prost(string, tag = "3")]
    pub device_name: String,
    /// What the container runtime is told.
    #[prost(string, repeated, tag = "4")]
    pub cdi_device_ids: Vec<String>,
}

/// What became of one claim.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PreparedClaim {
    /// Its devices.
    #[prost(message, repeated, tag = "1")]
    pub devices: Vec<Device>,
    /// Why it has none.
    #[prost(string, tag = "2")]
    pub error: String,
}

/// By uid.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PrepareResponse {
    /// Every claim of the request.
    #[prost(map = "string, message", tag = "1")]
    pub claims: HashMap<String, PreparedClaim>,
}

/// What became of one claim.
#[derive(Clone, PartialEq, prost::Message)]
pub struct UnpreparedClaim {
    /// Why it could not be taken back.
    #[prost(string, tag = "1")]
    pub error: String,
}

/// By uid.
#[derive(Clone, PartialEq, prost::Message)]
pub struct UnprepareResponse {
    /// Every claim of the request.
    #[prost(map = "string, message", tag = "1")]
    pub claims: HashMap<String, UnpreparedClaim>,
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    /// Put together by hand from the numbers of the kubelet's own definitions.
    #[test]
    fn messages_lie_on_the_wire_as_the_kubelet_has_them() {
        let claim = Claim { namespace: "ns".into(), uid: "u1".into(), name: "c".into() };
        let request = ClaimsRequest { claims: vec![claim] }.encode_to_vec();
        assert_eq!(request, b"\x0a\x0b\x0a\x02ns\x12\x02u1\x1a\x01c");
        let device = Device {
            request_names: vec!["r".into()],
            pool_name: "n1".into(),
            device_name: "d".into(),
            cdi_device_ids: vec!["v/c=x".into()],
        };
        let prepared = PreparedClaim { devices: vec![device], error: "e".into() };
        let answer = PrepareResponse { claims: HashMap::from([("u1".to_owned(), prepared)]) }.encode_to_vec();
        assert_eq!(answer, b"\x0a\x1c\x0a\x02u1\x12\x16\x0a\x11\x0a\x01r\x12\x02n1\x1a\x01d\x22\x05v/c=x\x12\x01e");
        let info = PluginInfo {
            r#type: "DRAPlugin".into(),
            name: "n".into(),
            endpoint: "/e".into(),
            supported_versions: vec!["v1.DRAPlugin".into()],
        };
        assert_eq!(info.encode_to_vec(), b"\x0a\x09DRAPlugin\x12\x01n\x1a\x02/e\x22\x0cv1.DRAPlugin");
        let status = RegistrationStatus { plugin_registered: true, error: "e".into() };
        assert_eq!(status.encode_to_vec(), b"\x08\x01\x12\x01e");
        let gone = HashMap::from([("u".to_owned(), UnpreparedClaim { error: "x".into() })]);
        assert_eq!(UnprepareResponse { claims: gone }.encode_to_vec(), b"\x0a\x08\x0a\x01u\x12\x03\x0a\x01x");
    }
}
