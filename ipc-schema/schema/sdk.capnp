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

# Where pages go.
struct Target {
  union {
    home @0 :Void;
    device @1 :UInt8;
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
}

struct ResidencyRun {
  firstPage @0 :UInt64;
  pageCount @1 :UInt64;
  residency @2 :Residency;
  # Device id, 0 unless residency is device.
  device @3 :UInt8;
  # Bit d: device d maps the page now.
  mappedMask @4 :UInt8;
  pinned @5 :Bool;
}

enum Advice {
  pin @0;               # goes home and stays
  unpin @1;
  inPlace @2;           # devices map system pages in place
  migrateOnFault @3;    # ends inPlace; the default
  deviceReadOnly @4;
  deviceReadWrite @5;   # ends deviceReadOnly
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
