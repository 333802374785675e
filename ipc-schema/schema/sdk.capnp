@0xc1cc46d793c28051;
# The client-side view: what an application sees of pages, regions and advice. The pager's interface is built from these types,
# and the SDK's public types are their twins. Ranges are in bytes (page aligned) or in pages of pageBytes.

const pageBytes :UInt64 = 4096;
# Runs in one answer. More fragmented results are asked for in pieces.
const maxRuns :UInt32 = 2048;
# Devices of one plan; device ids are 0 .. maxDevices-1.
const maxDevices :UInt32 = 8;
# Bytes of the random token that proves ownership of a space.
const maxTokenBytes :UInt32 = 64;
# Arguments and results of a job, kernels of a device.
const maxJobWords :UInt32 = 1024;
const maxKernels :UInt32 = 256;
# Ranges that a job names.
const maxJobRanges :UInt32 = 64;

# Where pages go.
struct Target {
  union {
    home @0 :Void;
    device @1 :UInt8;
  }
}

# Which pages of a range are to move.
struct Only {
  union {
    all @0 :Void;
    inSystem @1 :Void;      # to a device, those in system memory
    onDevice @2 :UInt8;     # home, those on this device
  }
}

# As Target, or nowhere in particular.
struct Place {
  union {
    nowhere @0 :Void;
    home @1 :Void;
    device @2 :UInt8;
  }
}

# What became of a page in a migration.
enum PageStatus {
  moved @0;
  alreadyThere @1;
  busy @2;          # lost a race: try again
  pinned @3;
  noMemory @4;      # device full, nothing to evict
  io @5;            # copy failed; the page is valid where it was
  poisoned @6;      # lost with a device: accesses get SIGBUS
  gone @7;          # unmapped meanwhile
  notSelected @8;   # not one of the pages that were to move
}

# pageCount neighbours of one fate, firstPage pages after the start of the asked range.
struct StatusRun {
  firstPage @0 :UInt64;
  pageCount @1 :UInt64;
  status @2 :PageStatus;
}

# Where a page is.
enum Residency {
  absent @0;        # never touched, reads as zero
  system @1;
  device @2;        # see ResidencyRun.device
  moving @3;
  poisoned @4;
  exclusive @5;     # see ResidencyRun.device: the device's alone
  duplicated @6;    # system memory, with a read-only copy on ResidencyRun.device
}

struct ResidencyRun {
  firstPage @0 :UInt64;
  pageCount @1 :UInt64;
  residency @2 :Residency;
  # Device id, 0 unless residency is device, exclusive or duplicated.
  device @3 :UInt8;
  # Bit d: device d maps the page now.
  mappedMask @4 :UInt8;
  pinned @5 :Bool;
  # One of 512 aligned pages in 512 aligned frames.
  huge @6 :Bool;
  # On a device, and the program reaches it there.
  coherent @7 :Bool;
}

# How a device may use pages.
enum AccessMode {
  migrate @0;           # a device fault moves the page (the default)
  inPlace @1;           # a device fault maps it where it is, if the device can reach it there
  none @2;              # device faults end with permission
}

struct Advice {
  union {
    pin @0 :Void;               # goes home and stays
    unpin @1 :Void;
    inPlace @2 :Void;           # all devices map system pages in place
    migrateOnFault @3 :Void;    # ends inPlace; the default
    deviceReadOnly @4 :Void;
    deviceReadWrite @5 :Void;   # ends deviceReadOnly
    access @6 :Access;
    preferredLocation @7 :Place;
    readMostly @8 :Bool;
    granularity @9 :UInt8;      # log2 of pages, or adaptive
  }

  struct Access {
    device @0 :UInt8;
    mode @1 :AccessMode;
  }
}

# Granularity that policy chooses.
const adaptive :UInt8 = 0xff;

# Places in a byte, where there are many of them: a device id below maxDevices, or one of these.
const nowhere :UInt8 = 0xff;
const atHome :UInt8 = 0xfe;

# What was advised, and where the pages were prefetched to last. Without pointers, so that
# maxRuns of them fit into one message.
struct AttributeRun {
  firstPage @0 :UInt64;
  pageCount @1 :UInt64;
  preferred @2 :UInt8;          # a place in a byte
  prefetched @3 :UInt8;         # a place in a byte
  inPlaceMask @4 :UInt8;
  noAccessMask @5 :UInt8;
  readMostly @6 :Bool;
  deviceReadOnly @7 :Bool;
  granularity @8 :UInt8;        # log2 of pages, or adaptive
  pinned @9 :Bool;
}

# What the test hook makes fail.
enum FaultPoint {
  hugeFrames @0;
  frames @1;
  copyOut @2;
  copyHome @3;
  systemHuge @4;    # allocation of a page of 2 MiB that comes home: small ones are tried instead
  systemPages @5;   # allocation of system memory for pages that come home
}

enum TraceKind {
  migrateStart @0;
  migrateEnd @1;
  invalidate @2;
  throttle @3;
}

enum TraceCause {
  prefetch @0;
  cpuFault @1;
  deviceFault @2;
  eviction @3;
  addressSpace @4;
}

# Records in one answer.
const maxTraceRecords :UInt32 = 256;

struct TraceRecord {
  sequence @0 :UInt64;
  timeNs @1 :UInt64;
  kind @2 :TraceKind;
  cause @3 :TraceCause;
  addr @4 :UInt64;
  pageCount @5 :UInt64;
  from @6 :Target;
  to @7 :Target;
}

# One region and how its pages are spread.
struct RegionStatus {
  space @0 :UInt64;
  pid @1 :UInt32;
  region @2 :UInt64;
  addr @3 :UInt64;
  pageCount @4 :UInt64;
  systemPages @5 :UInt64;
  absentPages @6 :UInt64;
  movingPages @7 :UInt64;
  poisonedPages @8 :UInt64;
  # By device id, at most maxDevices.
  devicePages @9 :List(UInt64);
}
