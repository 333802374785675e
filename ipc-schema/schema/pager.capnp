@0x800f55db4e3c659f;
# Clients own spaces and regions; drivers bring device memory; the mirror resolves device faults and carries invalidations.

using Sdk = import "sdk.capnp";

const maxRegions :UInt32 = 1024;
const maxWhyBytes :UInt32 = 1024;
const maxStripCells :UInt32 = 1024;
const maxRestMs :UInt32 = 60000;
const maxClaimIdBytes :UInt32 = 64;
const maxClaimNameBytes :UInt32 = 256;
const maxClaimsTold :UInt32 = 64;

# Every call is idempotent: targets are absolute, creations carry the client's own key. All added in 0.1.
struct Call {
  union {
    openSpace @0 :OpenSpace;            # client; idempotent by nonce
    attachSpace @1 :AttachSpace;        # client; idempotent
    closeSpace @2 :Void;                # client; idempotent
    createRegion @3 :CreateRegion;      # client; idempotent by range
    freeRegion @4 :FreeRegion;          # client; idempotent
    migrate @5 :Migrate;                # client; idempotent
    query @6 :Range;                    # client; idempotent
    advise @7 :Advise;                  # client; idempotent
    driverLogin @8 :DriverLogin;        # driver; idempotent by generation
    attachTable @9 :AttachTable;        # driver; idempotent
    mirrorLogin @10 :Void;              # mirror; idempotent
    openMirror @11 :OpenMirror;         # mirror; idempotent
    closeMirror @12 :CloseMirror;       # mirror; idempotent
    lookup @13 :Lookup;                 # mirror; idempotent
    resolve @14 :Resolve;               # mirror; idempotent
    invalidateDone @15 :InvalidateDone; # mirror; idempotent
    listRegions @16 :Void;              # operator; idempotent
    adoptRegion @17 :Range;             # client; idempotent by range
    attachFile @18 :AttachFile;         # client; idempotent by range
    releaseRange @19 :Range;            # client; idempotent
    discard @20 :Range;                 # client; idempotent
    protectionChanged @21 :Range;       # client; idempotent
    evict @22 :Evict;                   # client; idempotent
    queryAttributes @23 :Range;         # client; idempotent
    readTrace @24 :ReadTrace;           # client; idempotent
    inject @25 :Inject;                 # client, tests; idempotent
    framesDone @26 :FramesDone;         # client; idempotent
    hotRanges @27 :HotRanges;           # client; idempotent
    deviceLost @28 :UInt8;              # driver; idempotent
    agentStarted @29 :AgentStarted;     # client; idempotent
    revalidate @30 :Range;              # client; idempotent
    home @31 :Home;                     # operator, or a client about itself; idempotent
    emptyDevice @32 :UInt8;             # operator; idempotent
    userfaultfdDevice @33 :Void;        # client; idempotent
    strip @34 :Strip;                   # operator; idempotent
    moveRegion @35 :MoveRegion;         # operator; idempotent
    moveRange @36 :MoveRange;           # operator; idempotent
    setClaim @37 :Claim;                # operator; idempotent by id
    removeClaim @38 :Text;              # operator; idempotent
    listClaims @39 :Text;               # operator; idempotent: those behind this id
  }
}

# What whoever shows the token may use of devices.
struct Claim {
  id @0 :Text;                # at most maxClaimIdBytes
  name @1 :Text;              # at most maxClaimNameBytes
  token @2 :Data;             # in calls; 32 bytes
  shares @3 :List(Share);     # at most Sdk.maxDevices
  spaces @4 :UInt32;          # in answers: who uses it
}

struct Share {
  device @0 :UInt8;
  bytes @1 :UInt64;
  usedBytes @2 :UInt64;       # in answers
}

# Where a region's pages are, in so many cells of equal size.
struct Strip {
  region @0 :UInt64;
  cells @1 :UInt16;           # at most maxStripCells
}

# What of a process is managed there, as if it had asked itself.
struct MoveRange {
  pid @0 :UInt32;
  process @1 :UInt64;         # the same process by its name, 0: not known
  addr @2 :UInt64;
  lenBytes @3 :UInt64;
  target @4 :Sdk.Target;
  restMs @5 :UInt32;          # private pages go only if nobody touches them for so long; 0: at once. At most maxRestMs
  stays @6 :Bool;             # those that nobody has touched stay, too (notSelected): to learn what could go
}

struct MoveRegion {
  region @0 :UInt64;
  target @1 :Sdk.Target;
}

# What the pager needs to work with a client's agent.
struct AgentMemory {
  mapsFd @0 :UInt16;          # /proc/self/maps
  pagemapFd @1 :UInt16;       # /proc/self/pagemap
  stagingFd @2 :UInt16;       # sealed memfd, 16 slots of 2 MiB
  ordersFd @3 :UInt16;        # sealed memfd, see uhmm_shared::agent
  doneFd @4 :UInt16;          # eventfd: there are answers
  agentFd @5 :UInt16;         # pidfd of the agent, or noFd: it is a thread of the client
  smapsFd @6 :UInt16;         # /proc/self/smaps
}

# Another agent carries out the client's orders from now on.
struct AgentStarted {
  agentFd @0 :UInt16;         # as in AgentMemory
}

struct AttachFile {
  addr @0 :UInt64;
  lenBytes @1 :UInt64;
  fileFd @2 :UInt16;
  offsetBytes @3 :UInt64;
}

struct Evict {
  device @0 :UInt8;
  pageCount @1 :UInt64;       # 0: all
}

struct HotRanges {
  device @0 :UInt8;
}

struct ReadTrace {
  since @0 :UInt64;
}

struct Inject {
  point @0 :Sdk.FaultPoint;
  nth @1 :UInt32;
}

struct FramesDone {
  id @0 :UInt64;
  done @1 :Bool;              # all pages of the order are as it says
}

struct OpenSpace {
  nonce @0 :UInt64;
  uffdFd @1 :UInt16;
  full @2 :Bool;
  sentinelAddr @3 :UInt64;
  agent @4 :AgentMemory;
  claim @5 :Data;             # its token, at most Sdk.maxTokenBytes; empty: none
}

struct AttachSpace {
  space @0 :UInt64;
  token @1 :Data;
  agent @2 :AgentMemory;      # null unless the pager does not have it
}

struct CreateRegion {
  addr @0 :UInt64;
  lenBytes @1 :UInt64;
  memoryFd @2 :UInt16;
}

struct FreeRegion {
  region @0 :UInt64;
}

struct Range {
  addr @0 :UInt64;
  lenBytes @1 :UInt64;
}

struct Migrate {
  addr @0 :UInt64;
  lenBytes @1 :UInt64;
  target @2 :Sdk.Target;
  prefetch @3 :Bool;
  only @4 :Sdk.Only;
}

# Every page of a process comes home and stays there.
struct Home {
  pid @0 :UInt32;             # 0: the caller's own space
  stay @1 :Bool;              # false: pages may leave again
  process @2 :UInt64;         # the same process by its name, 0: not known. The number is another one in another pid namespace
}

struct Advise {
  addr @0 :UInt64;
  lenBytes @1 :UInt64;
  advice @2 :Sdk.Advice;
}

struct DriverLogin {
  device @0 :UInt8;
  generation @1 :UInt64;
  frameCount @2 :UInt32;
  apertureFd @3 :UInt16;      # or noFd
  gateFd @4 :UInt16;          # or noFd
  copyRing @5 :CopyRing;      # null when the device has an aperture
  apertureOffset @6 :UInt64;  # where in the aperture's file device memory begins
}

struct CopyRing {
  ringFd @0 :UInt16;
  submitFd @1 :UInt16;
  completeFd @2 :UInt16;
  stagingFd @3 :UInt16;
}

struct AttachTable {
  space @0 :UInt64;
  region @1 :UInt64;
  tableFd @2 :UInt16;
}

struct OpenMirror {
  space @0 :UInt64;
  token @1 :Data;
  device @2 :UInt8;
}

struct CloseMirror {
  space @0 :UInt64;
  device @1 :UInt8;
}

struct Lookup {
  space @0 :UInt64;
  addr @1 :UInt64;
}

struct Resolve {
  space @0 :UInt64;
  region @1 :UInt64;
  firstPage @2 :UInt64;
  pageCount @3 :UInt64;
  faultPage @4 :UInt64;
  device @5 :UInt8;
  write @6 :Bool;
  whole @7 :Bool;
  exclusive @8 :Bool;
}

struct InvalidateDone {
  id @0 :UInt64;
  lateMask @1 :UInt8;
}

struct Reply {
  union {
    done @0 :Void;
    spaceOpened @1 :SpaceOpened;
    regionCreated @2 :RegionCreated;
    migrated @3 :Migrated;
    residency @4 :List(Sdk.ResidencyRun);   # at most maxRuns
    region @5 :Region;
    resolved @6 :List(MapRun);              # at most maxRuns
    regions @7 :List(Sdk.RegionStatus);     # at most maxRegions
    attributes @8 :List(Sdk.AttributeRun);  # at most maxRuns
    trace @9 :List(Sdk.TraceRecord);        # at most maxTraceRecords
    evicted @10 :Evicted;
    childAttached @11 :ChildAttached;
    hotRanges @12 :List(HotRange);          # at most Sdk.maxRuns
    granted @13 :List(Range);               # at most Sdk.maxRuns
    userfaultfdDeviceFd @14 :UInt16;        # /dev/userfaultfd, open: the caller makes its own userfaultfd with it
    strip @15 :Data;                        # at most maxStripCells; see message::pager::Reply::Strip
    claims @16 :Claims;
  }
}

struct Claims {
  claims @0 :List(Claim);     # at most maxClaimsTold, by id
  more @1 :Bool;              # there are some behind these
  devices @2 :List(DeviceUse); # at most Sdk.maxDevices
  hasRules @3 :Bool;          # who shows no claim is held to rules of the manifest
}

struct DeviceUse {
  device @0 :UInt8;
  name @1 :Text;              # at most maxClaimNameBytes
  memoryBytes @2 :UInt64;     # 0: it is not there
  freeBytes @3 :UInt64;
  closed @4 :Bool;            # drained
}

struct SpaceOpened {
  space @0 :UInt64;
  token @1 :Data;
  features @2 :UInt64;
}

struct RegionCreated {
  region @0 :UInt64;
}

struct Migrated {
  movedPages @0 :UInt64;
  runs @1 :List(Sdk.StatusRun);             # at most maxRuns
  why @2 :Text;                             # why pages of a bad fate stayed; cut to maxWhyBytes
}

# 2 MiB that a device has used lately.
struct HotRange {
  addr @0 :UInt64;            # a multiple of 2 MiB
  heatPermille @1 :UInt16;    # 1000: every page in every period
}

struct ChildAttached {
  uffdFd @0 :UInt16;
  features @1 :UInt64;
}

struct Evicted {
  pageCount @0 :UInt64;
}

struct Region {
  region @0 :UInt64;
  addr @1 :UInt64;
  lenBytes @2 :UInt64;
  deviceReadOnly @3 :Bool;
  memory :union {
    private @4 :Void;         # nobody else can reach it
    sealed @5 :MemoryFile;    # may be mapped
    file @6 :MemoryFile;      # may shrink: read and written, never mapped
  }
}

struct MemoryFile {
  fileFd @0 :UInt16;
  offsetBytes @1 :UInt64;     # of the region's first page
}

# Device mappings to install; firstPage counts from the start of the region.
struct MapRun {
  firstPage @0 :UInt64;
  pageCount @1 :UInt64;
  union {
    frame @2 :UInt32;     # consecutive device frames, the first one here
    system @3 :Void;      # the region's memfd at the same offset
  }
  writable @4 :Bool;
}

# Downward, to the mirror and to clients. All added in 0.1.
struct Event {
  union {
    invalidate @0 :Invalidate;    # absolute and repeatable
    deviceVoid @1 :DeviceVoid;
    spaceGone @2 :SpaceGone;
    frames @3 :Frames;            # to a client; absolute and repeatable, answered by the call framesDone
  }
}

# Which memory shall be mapped at pages of an allocated region.
struct Frames {
  id @0 :UInt64;
  region @1 :UInt64;
  firstPage @2 :UInt64;
  addr @3 :UInt64;
  pageCount @4 :UInt64;
  op :union {
    mapDevice @5 :MapDevice;
    unmapDevice @6 :Void;       # the region's own
  }
}

# Frames of a coherent device, from here on, at the address.
struct MapDevice {
  device @0 :UInt8;
  frame @1 :UInt32;
  generation @2 :UInt64;          # of the memory, as in queueOpened
}

struct Invalidate {
  id @0 :UInt64;
  space @1 :UInt64;
  region @2 :UInt64;
  firstPage @3 :UInt64;
  pageCount @4 :UInt64;
  deviceMask @5 :UInt8;
  unmap @6 :Bool;
  deadlineMs @7 :UInt32;
}

struct DeviceVoid {
  device @0 :UInt8;
}

struct SpaceGone {
  space @0 :UInt64;
}
