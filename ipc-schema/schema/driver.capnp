@0xdfdbb225f15ac42a;
# SDK clients open a queue and submit jobs on virtual addresses.

# All added in 0.1.
struct Call {
  union {
    info @0 :Void;              # idempotent
    openQueue @1 :OpenQueue;    # idempotent
    submit @2 :Submit;          # idempotent only if the job says so; else the caller gets the error stale
    access @3 :Access;          # idempotent unless it is fetchAdd
  }
}

struct Access {
  space @0 :UInt64;
  addr @1 :UInt64;
  lenBytes @2 :UInt64;
  bufferFd @3 :UInt16;          # or noFd
  op :union {
    read @4 :Void;
    write @5 :Void;
    fetchAdd @6 :UInt64;
    makeExclusive @7 :Void;
    map @8 :Void;                 # pages are brought and mapped; nothing is read or written
    peek @9 :Void;                # as read, but what is not mapped ends it: nothing is brought
    mapForWrite @10 :Void;        # as map, so that the pages may be written
  }
}

struct OpenQueue {
  space @0 :UInt64;
  token @1 :Data;
}

struct Submit {
  space @0 :UInt64;
  kernel @1 :Text;
  args @2 :List(UInt64);        # at most maxJobWords
  # The job may be run again from its start.
  idempotent @3 :Bool;
  # What the job uses: brought and mapped before it starts. At most maxJobRanges.
  ranges @4 :List(JobRange);
}

# Whole pages.
struct JobRange {
  addr @0 :UInt64;
  lenBytes @1 :UInt64;
  write @2 :Bool;
}

struct Reply {
  union {
    info @0 :Info;
    queueOpened @1 :QueueOpened;
    finished @2 :Finished;
    accessed @3 :Accessed;
  }
}

# A coherent device's memory, for a client that has proven itself.
struct QueueOpened {
  memoryFd @0 :UInt16;          # or noFd: the device is not coherent
  device @1 :UInt8;
  generation @2 :UInt64;
  memoryOffset @3 :UInt64;      # where in the file device memory begins
}

struct Accessed {
  pageCount @0 :UInt64;
  faultCount @1 :UInt64;
}

struct Info {
  driver @0 :Text;
  device @1 :UInt8;
  memoryBytes @2 :UInt64;
  aperture @3 :Bool;
  kernels @4 :List(Text);       # at most maxKernels
  coherent @5 :Bool;            # the program reaches pages of allocated memory there
}

struct Finished {
  results @0 :List(UInt64);     # at most maxJobWords
  faultCount @1 :UInt64;
  runTimeNs @2 :UInt64;
}
