//! Claims: shares of devices that an operator gives out while the system runs, to whoever shows their token. Part of the pager's messages.

/// A claim, as it is set, and as it is told (without the token).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Claim {
    /// Its key: 1 to 64 bytes.
    pub id: String,
    /// What refusals call it.
    pub name: String,
    /// Who shows this uses it: 32 bytes, at random. Empty in answers.
    pub token: Vec<u8>,
    /// Of which devices how much; none of the others.
    pub shares: Vec<ClaimShare>,
    /// In answers: how many processes use it.
    pub spaces: u32,
}

/// A part of one device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClaimShare {
    /// Device.
    pub device: u8,
    /// Most device memory of all who use the claim.
    pub bytes: u64,
    /// In answers: what they have there.
    pub used_bytes: u64,
}

/// What there is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Claims {
    /// By id.
    pub claims: Vec<Claim>,
    /// There are more behind these.
    pub more: bool,
    /// Every device of the plan.
    pub devices: Vec<DeviceUse>,
    /// Who shows no claim is held to rules of the manifest; without any, such a one may use everything.
    pub has_rules: bool,
}

/// One device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceUse {
    /// Its id.
    pub device: u8,
    /// Its name.
    pub name: String,
    /// What it has; 0: its driver is not there.
    pub memory_bytes: u64,
    /// Of that: in nobody's use.
    pub free_bytes: u64,
    /// It is drained.
    pub closed: bool,
}
