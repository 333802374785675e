@0xbe33ff4e7d99fd92;
# Drivers open a mirror on a process, ask for device faults, acknowledge invalidations.

using Pager = import "pager.capnp";

# Every call is idempotent. All added in 0.1.
struct Call {
  union {
    login @0 :Login;      # idempotent; first call of a session
    open @1 :Open;        # idempotent
    close @2 :Close;      # idempotent
    lookup @3 :Lookup;    # idempotent
    fault @4 :Fault;      # idempotent; error busy: an invalidation ran meanwhile, ask again
    ack @5 :Ack;          # idempotent
  }
}

struct Login {
  device @0 :UInt8;
}

struct Open {
  space @0 :UInt64;
  token @1 :Data;
}

struct Close {
  space @0 :UInt64;
}

struct Lookup {
  space @0 :UInt64;
  addr @1 :UInt64;
}

struct Fault {
  space @0 :UInt64;
  region @1 :UInt64;
  firstPage @2 :UInt64;
  pageCount @3 :UInt64;
  faultPage @4 :UInt64;
  write @5 :Bool;
  whole @6 :Bool;
  exclusive @7 :Bool;
}

struct Ack {
  id @0 :UInt64;
}

struct Reply {
  union {
    done @0 :Void;
    region @1 :Pager.Region;
    mapped @2 :Mapped;
  }
}

struct Mapped {
  sequence @0 :UInt64;
  runs @1 :List(Pager.MapRun);    # at most maxRuns
}

# Downward, to drivers. All added in 0.1.
struct Event {
  union {
    invalidate @0 :Invalidate;    # answered by the call ack
    spaceGone @1 :Pager.SpaceGone;
  }
}

struct Invalidate {
  id @0 :UInt64;
  space @1 :UInt64;
  region @2 :UInt64;
  firstPage @3 :UInt64;
  pageCount @4 :UInt64;
  unmap @5 :Bool;
  sequence @6 :UInt64;
}
