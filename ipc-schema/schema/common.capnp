@0x89d77a3d3e642fa6;
# What every interface shares: the envelope, the handshake, the closed error enum, metrics.
#
# One datagram of a SOCK_SEQPACKET connection holds exactly one Envelope in the standard framing (segment table first).
# Descriptors travel beside the bytes by SCM_RIGHTS. Every UInt16 field whose name ends in 'Fd' is an index into them; each
# descriptor is named exactly once and in the order in which the fields are read. noFd means 'none' where the field is optional.
#
#   caller                       callee
#     |---- hello ----------------->|      first message; kind error and close when refused
#     |<--- welcome ----------------|
#     |---- call (callId n) ------->|
#     |<--- reply | error (n) ------|      exactly one a call, any order
#     |<--- event ------------------|      only downward, never answered
#
# Versions: the major number must agree, the minor number is the smaller one of both sides. Fields and union members are only
# ever added at the end and are marked 'added in X.Y'; nothing is renumbered. Unknown union members are refused.

const majorVersion :UInt16 = 0;
const minorVersion :UInt16 = 1;
const noFd :UInt16 = 0xffff;

# Bounds that both sides enforce, in bytes or in elements.
const maxNameBytes :UInt32 = 256;
const maxKeyBytes :UInt32 = 64;
const maxTextBytes :UInt32 = 4096;
const maxMetrics :UInt32 = 512;

enum Kind {
  hello @0;
  welcome @1;
  call @2;
  reply @3;
  error @4;
  event @5;
}

# Whose body the envelope carries. 'common' is spoken on every connection.
enum Interface {
  common @0;
  supervisor @1;
  pager @2;
  mirror @3;
  driver @4;
}

# Added in 0.1.
struct Envelope {
  kind @0 :Kind;
  interface @1 :Interface;
  # Unique for the life of the connection, chosen by the caller; 0 for hello, welcome, events and for an error that answers no call.
  callId @2 :UInt64;
  # Follows one request through all services; 0 is 'not traced'.
  traceId @3 :UInt64;
  # Negotiated minor version; the caller's own in hello.
  interfaceVersion @4 :UInt16;
  # How often the sender has been started. It never changes within a connection.
  incarnation @5 :UInt32;
  # Time left for the call in milliseconds; 0 is 'no deadline'.
  deadlineMs @6 :UInt32;
  # Descriptors beside this message.
  fdCount @7 :UInt16;
  # Hello | Welcome | Call | Reply | Error | Event, by kind and interface.
  body @8 :AnyPointer;
}

enum Role {
  client @0;
  operator @1;
  pager @2;
  mirror @3;
  driver @4;
  supervisor @5;
}

# Added in 0.1.
struct Hello {
  major @0 :UInt16;
  minor @1 :UInt16;
  interface @2 :Interface;
  role @3 :Role;
  name @4 :Text;
  incarnation @5 :UInt32;
  # Channel key of service roles; empty for clients and operators.
  key @6 :Data;
  maxMessageBytes @7 :UInt32;
  maxFds @8 :UInt16;
}

# Added in 0.1. Limits are the minimum of both sides.
struct Welcome {
  major @0 :UInt16;
  minor @1 :UInt16;
  name @2 :Text;
  incarnation @3 :UInt32;
  maxMessageBytes @4 :UInt32;
  maxFds @5 :UInt16;
}

# The kernel's meanings. Closed: a new one needs a new minor version.
enum ErrorCode {
  fault @0;         # EFAULT: the address cannot be read
  permission @1;    # EPERM: write to a read-only mapping, or a peer that may not do this
  invalid @2;       # EINVAL: hole, misaligned or malformed
  notFound @3;      # ENOENT: nothing there
  busy @4;          # EBUSY: invalidated meanwhile, retry
  noMemory @5;      # ENOMEM: device full
  io @6;            # EIO: the device failed
  stale @7;         # ESTALE: the incarnation that was asked is dead; the call may or may not have happened
  timedOut @8;      # ETIMEDOUT: the deadline passed
  protocol @9;      # EPROTO: malformed, oversized or of an unknown version
}

struct Error {
  code @0 :ErrorCode;
  text @1 :Text;
}

struct Metric {
  # Carries the unit: fault_latency_p99_ns.
  name @0 :Text;
  value @1 :UInt64;
}

# Calls that every service answers.
struct Call {
  union {
    stats @0 :Void;           # idempotent, added in 0.1
    reserved @1 :Void;        # never sent; keeps the union open
  }
}

struct Reply {
  union {
    stats @0 :List(Metric);   # at most maxMetrics
    reserved @1 :Void;        # never sent
  }
}
