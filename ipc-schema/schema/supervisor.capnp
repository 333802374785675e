@0x8e56f6540de0e350;
# Services register, keep descriptors in the vault and answer heartbeats; the operator asks for status.

const maxPlanBytes :UInt32 = 49152;
const maxChannelKeys :UInt32 = 64;
const maxVaultEntries :UInt32 = 64;
const maxServices :UInt32 = 128;

# Every call is idempotent. All added in 0.1.
struct Call {
  union {
    register @0 :Register;        # idempotent; sent again after the supervisor's own restart
    ready @1 :Void;               # idempotent
    vaultPut @2 :VaultPut;        # idempotent: replaces an older entry of that name
    vaultGet @3 :VaultGet;        # idempotent
    vaultRemove @4 :VaultRemove;  # idempotent
    fence @5 :Fence;              # idempotent: names the incarnation
    status @6 :Void;              # idempotent; operator
    shutdown @7 :Void;            # idempotent; operator
    kill @8 :Kill;                # idempotent in effect: the service ends up restarted; operator
    pong @9 :Pong;                # idempotent
    join @10 :Join;               # a process that the supervisor did not start; answered when its turn has come
    record @11 :Record;           # idempotent; operator
    operatorKey @12 :Text;        # idempotent; operator: of the service with a socket of this name
  }
}

# Who asks is in the hello's name, `join:NAME`, and proven by its key (the manifest's token) or its user.
struct Join {
  guardFd @0 :UInt16;           # noFd: nobody can kill it but by a signal. Else one byte sent there ends the process at once
}

struct Register {
  service @0 :Text;
  incarnation @1 :UInt32;
}

struct VaultPut {
  name @0 :Text;
  entryFd @1 :UInt16;
}

struct VaultGet {
  prefix @0 :Text;
  after @1 :Text;
}

struct VaultRemove {
  prefix @0 :Text;
}

struct Fence {
  service @0 :Text;
  incarnation @1 :UInt32;
  reason @2 :Text;
}

struct Kill {
  service @0 :Text;
}

struct Record {
  service @0 :Text;
}

struct Pong {
  sequence @0 :UInt64;
}

struct Reply {
  union {
    done @0 :Void;
    registered @1 :Registered;
    vault @2 :Vault;
    status @3 :List(ServiceStatus);   # at most maxServices
    killed @4 :Killed;
    joined @5 :Joined;
    record @6 :UInt16;                # a memfd for reading, see uhmm_shared::record
    key @7 :Data;
  }
}

struct Joined {
  incarnation @0 :UInt32;
  key @1 :Data;                       # for the channel to the supervisor
  # What a holder is given: its listening socket, and keys by name as TOML.
  listenerFd @2 :UInt16;              # noFd for services: they get theirs when they register
  keysToml @3 :Text;                  # at most maxPlanBytes
}

struct Registered {
  planToml @0 :Text;                  # at most maxPlanBytes
  # noFd when the service has no socket.
  listenerFd @1 :UInt16;
  channelKeys @2 :List(ChannelKey);   # at most maxChannelKeys
}

struct ChannelKey {
  peer @0 :Text;
  key @1 :Data;
}

struct Vault {
  entries @0 :List(VaultEntry);       # at most maxVaultEntries and as many as descriptors fit beside one message
  more @1 :Bool;
}

struct VaultEntry {
  name @0 :Text;
  entryFd @1 :UInt16;
}

struct ServiceStatus {
  name @0 :Text;
  pid @1 :UInt32;
  incarnation @2 :UInt32;
  state @3 :Text;
  lastExit @4 :Text;
  uptimeMs @5 :UInt64;
  missedHeartbeats @6 :UInt32;
  lastRecoveryMs @7 :UInt64;
  vaultEntries @8 :UInt32;
}

struct Killed {
  incarnation @0 :UInt32;
  pid @1 :UInt32;
}

# Downward. All added in 0.1.
struct Event {
  union {
    ping @0 :Ping;                    # answered by the call pong, from the event loop
    serviceDied @1 :ServiceDied;
    stop @2 :Void;
  }
}

struct Ping {
  sequence @0 :UInt64;
}

struct ServiceDied {
  service @0 :Text;
  incarnation @1 :UInt32;
  held @2 :Bool;
}
