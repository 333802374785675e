/*
 * uhmm: memory whose pages move between system memory and devices while every pointer stays what it is.
 * Link with -luhmm. A system must run: `uhmm up`.
 *
 * Errors. A function answers 0 (where it says so, another number from 0 on) or a negative number of <errno.h>:
 *   -EFAULT    no mapping there, or not readable          -ENOMEM    device full, or no memory
 *   -EPERM     read-only, or not allowed                  -EIO       the device or a system call failed, or a bug here
 *   -EINVAL    misaligned, a hole, a wrong argument       -ESTALE    the service died; the call may or may not be done
 *   -ENOENT    nothing there                              -ETIMEDOUT the deadline passed
 *   -EBUSY     invalidated meanwhile: try again           -EPROTO    the service speaks another protocol
 *   -ENOTCONN  no system runs in the run directory        -EAGAIN    no process or thread can be made: a limit is reached
 * What each function gives is listed with it. Beside that, every function gives -EINVAL for a handle, pointer, length or value that is wrong, and
 * -EIO where a bug was met. "The services' own" are: -ESTALE, the session's thread was killed, or a service died in the middle of something
 * that must not be done twice; -EPERM, this process may not connect any more (it became another user, or a filter forbids it); -ENOMEM, no memory
 * for the call; -ETIMEDOUT, a deadline; -EPROTO.
 * uhmm_last_error() has the text of it. When a function fails, what it would have answered is not written; a buffer for data
 * may be written in part.
 *
 * Addresses and lengths of ranges are multiples of UHMM_PAGE_BYTES; nothing is rounded.
 *
 * Pointers. A pointer to a variable or buffer may be NULL only where it is said; otherwise it points to live memory of the
 * length that is given with it, which nobody else writes during the call. Handles (uhmm_session *, uhmm_device *,
 * uhmm_pending *) are numbers: a handle that is NULL, closed, or of another kind is -EINVAL, never a crash. After fork() the
 * parent's handles are refused in the child: see uhmm_in_child().
 *
 * What the kernel does not wait for. A page on a device is there for the program and, where uhmm_system_calls_wait() is 1, for its system calls.
 * It is not there for what the kernel does when a thread ends (robust and priority-inheriting futexes, clear_child_tid words: keep their pages home
 * with uhmm_pin()), nor for those who read the process from outside without waiting: core dumps, gcore, gdb, /proc/PID/mem. For them everything
 * comes home with `uhmm home PID`, uhmm_stay_home(), or before the end with uhmm_home_on_fatal_signals(). process_vm_readv(2) waits.
 *
 * Threads. Every function may be called from every thread, with the same handles.
 *
 * Generated from sdk/capi/src by sdk/capi/tests/header.rs: do not edit.
 */

#ifndef UHMM_H
#define UHMM_H

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/**
 * Bytes of one page: the unit of addresses and lengths.
 */
#define UHMM_PAGE_BYTES 4096

/**
 * Protection: the program may read. The same number as PROT_READ.
 */
#define UHMM_PROTECT_READ 1

/**
 * Protection: the program may write. The same number as PROT_WRITE.
 */
#define UHMM_PROTECT_WRITE 2

/**
 * Left alone: libuhmm's own.
 */
#define UHMM_LEFT_OWN 0

/**
 * Left alone: shared mappings; adopt them one by one.
 */
#define UHMM_LEFT_SHARED 1

/**
 * Left alone: private mappings of files.
 */
#define UHMM_LEFT_FILE 2

/**
 * Left alone: private MAP_HUGETLB memory.
 */
#define UHMM_LEFT_HUGE_PAGES 3

/**
 * Left alone: the kernel's mappings, and devices' memory.
 */
#define UHMM_LEFT_KERNEL 4

/**
 * Left alone: executable.
 */
#define UHMM_LEFT_EXECUTABLE 5

/**
 * Left alone: stacks that grow by themselves.
 */
#define UHMM_LEFT_GROWS_DOWN 6

/**
 * Left alone: PROT_NONE, reserved addresses.
 */
#define UHMM_LEFT_NO_ACCESS 7

/**
 * Left alone: stacks and control blocks of threads.
 */
#define UHMM_LEFT_THREAD_STACK 8

/**
 * Left alone: given back by uhmm_release().
 */
#define UHMM_LEFT_RELEASED 9

/**
 * Left alone: mlock().
 */
#define UHMM_LEFT_LOCKED 10

/**
 * Left alone: MADV_DONTFORK.
 */
#define UHMM_LEFT_NOT_INHERITED 11

/**
 * Left alone: MADV_WIPEONFORK.
 */
#define UHMM_LEFT_WIPED_IN_CHILDREN 12

/**
 * Left alone: mseal().
 */
#define UHMM_LEFT_SEALED 13

/**
 * Left alone: less than 64 KiB together with its neighbours, or a small growth of the heap.
 */
#define UHMM_LEFT_SMALL 14

/**
 * Left alone: the manifest's quota is reached.
 */
#define UHMM_LEFT_QUOTA 15

/**
 * Left alone: refused by the pager or the kernel, for example because another userfaultfd has it.
 */
#define UHMM_LEFT_REFUSED 16

/**
 * How many reasons there are.
 */
#define UHMM_LEFT_REASONS 17

/**
 * Longest name of a device or driver, with its final zero.
 */
#define UHMM_NAME_BYTES 65

/**
 * Fate of a page: moved now.
 */
#define UHMM_PAGE_MOVED 0

/**
 * Fate of a page: it was there already.
 */
#define UHMM_PAGE_ALREADY_THERE 1

/**
 * Fate of a page: it lost a race; try again.
 */
#define UHMM_PAGE_BUSY 2

/**
 * Fate of a page: pinned, stays. Or locked (mlock, mlockall), and RLIMIT_MEMLOCK has no room for it a second time while it moves: raise it
 * (ulimit -l).
 */
#define UHMM_PAGE_PINNED 3

/**
 * Fate of a page: the device is full and nothing could be evicted. Or the way out of the address space needs more than the process may have:
 * vm.max_map_count, its control group's memory.
 */
#define UHMM_PAGE_NO_MEMORY 4

/**
 * Fate of a page: the copy failed; it is valid where it was.
 */
#define UHMM_PAGE_IO 5

/**
 * Fate of a page: lost with a device; touching it raises SIGBUS.
 */
#define UHMM_PAGE_POISONED 6

/**
 * Fate of a page: unmapped meanwhile.
 */
#define UHMM_PAGE_GONE 7

/**
 * Fate of a page: not one of those that were to move, see UHMM_MIGRATE_*.
 */
#define UHMM_PAGE_NOT_SELECTED 8

/**
 * How many fates there are.
 */
#define UHMM_PAGE_FATES 9

/**
 * Migrates: to the device, only what is in system memory; pages on other devices stay there.
 */
#define UHMM_MIGRATE_FROM_SYSTEM 1

/**
 * Migrates: home, only what is on the device; pages on other devices stay there.
 */
#define UHMM_MIGRATE_FROM_DEVICE 2

/**
 * Migrates, and the device maps what is there then: its accesses meet no fault. Not with UHMM_MIGRATE_FROM_DEVICE.
 */
#define UHMM_MIGRATE_AND_MAP 4

/**
 * The job only reads, or writes absolute values: it is run again from its start after a restart of the driver. Other jobs end with
 * -ESTALE then.
 */
#define UHMM_JOB_IDEMPOTENT 1

/**
 * The job reads the range.
 */
#define UHMM_JOB_READS 0

/**
 * The job writes the range, and may read it.
 */
#define UHMM_JOB_WRITES 1

/**
 * Advice: bring the range home and keep it there. No device, value 0.
 */
#define UHMM_ADVISE_PIN 0

/**
 * Advice: ends UHMM_ADVISE_PIN. No device, value 0.
 */
#define UHMM_ADVISE_UNPIN 1

/**
 * Advice: devices map system pages in place instead of migrating them. No device, value 0.
 */
#define UHMM_ADVISE_IN_PLACE 2

/**
 * Advice: device faults migrate (the default). No device, value 0.
 */
#define UHMM_ADVISE_MIGRATE_ON_FAULT 3

/**
 * Advice: devices may only read. No device, value 0.
 */
#define UHMM_ADVISE_DEVICE_READ_ONLY 4

/**
 * Advice: devices may write too (the default). No device, value 0.
 */
#define UHMM_ADVISE_DEVICE_READ_WRITE 5

/**
 * Advice: how one device may use the range. The value is UHMM_ACCESS_*.
 */
#define UHMM_ADVISE_ACCESS 6

/**
 * Advice: the pages shall live on this device, or at home without a device, if nobody has a better claim. Value 0.
 */
#define UHMM_ADVISE_PREFER 7

/**
 * Advice: nowhere in particular (the default). No device, value 0.
 */
#define UHMM_ADVISE_PREFER_NONE 8

/**
 * Advice: value 1, mostly read: reading devices get copies, the first write collapses them; value 0 ends it (the default). No device.
 * End it before MADV_MERGEABLE (KSM takes away the write protection that copies live by; memory that is mergeable before is taken out of
 * KSM when it is copied), and before MADV_GUARD_INSTALL on allocated memory, which Linux 6.18 tries for ever under that protection.
 */
#define UHMM_ADVISE_READ_MOSTLY 9

/**
 * Advice: one CPU fault brings home an aligned block of 2^value pages, 0 to 63, or UHMM_GRANULARITY_ADAPTIVE. Of a block of more than 2 MiB
 * the rest follows when the fault is answered, unless pages of the region are sent to a device meanwhile. No device.
 */
#define UHMM_ADVISE_GRANULARITY 10

/**
 * Access: a device fault moves the page to the device (the default).
 */
#define UHMM_ACCESS_MIGRATE 0

/**
 * Access: a device fault maps the page where it is, if the device can reach it there.
 */
#define UHMM_ACCESS_IN_PLACE 1

/**
 * Access: the device may not use the page; its accesses end with -EPERM.
 */
#define UHMM_ACCESS_NONE 2

/**
 * Granularity: adapts to the program (the default).
 */
#define UHMM_GRANULARITY_ADAPTIVE 255

/**
 * Place: system memory. Places from 0 on are device ids.
 */
#define UHMM_PLACE_HOME -1

/**
 * Place: nowhere in particular, never.
 */
#define UHMM_PLACE_NONE -2

/**
 * Mixed: the preferred place differs inside the range.
 */
#define UHMM_MIXED_PREFERRED 1

/**
 * Mixed: the last prefetch went to different places inside the range.
 */
#define UHMM_MIXED_PREFETCHED 2

/**
 * Mixed: which devices map in place differs inside the range.
 */
#define UHMM_MIXED_IN_PLACE 4

/**
 * Mixed: which devices may not use the pages differs inside the range.
 */
#define UHMM_MIXED_NO_ACCESS 8

/**
 * Mixed: some pages are mostly read, some are not.
 */
#define UHMM_MIXED_READ_MOSTLY 16

/**
 * Mixed: some pages are read-only for devices, some are not.
 */
#define UHMM_MIXED_DEVICE_READ_ONLY 32

/**
 * Mixed: the granularity differs inside the range.
 */
#define UHMM_MIXED_GRANULARITY 64

/**
 * Mixed: some pages are pinned, some are not.
 */
#define UHMM_MIXED_PINNED 128

/**
 * Residency: never touched; reads as zero.
 */
#define UHMM_RESIDENCY_ABSENT 0

/**
 * Residency: system memory.
 */
#define UHMM_RESIDENCY_SYSTEM 1

/**
 * Residency: memory of `device`.
 */
#define UHMM_RESIDENCY_DEVICE 2

/**
 * Residency: memory of `device`, which nobody else may use without taking it back.
 */
#define UHMM_RESIDENCY_EXCLUSIVE 3

/**
 * Residency: system memory, with a read-only copy on `device`.
 */
#define UHMM_RESIDENCY_DUPLICATED 4

/**
 * Residency: on its way.
 */
#define UHMM_RESIDENCY_MOVING 5

/**
 * Residency: lost with a device; touching it raises SIGBUS.
 */
#define UHMM_RESIDENCY_POISONED 6

/**
 * No device, where a device id could stand.
 */
#define UHMM_NO_DEVICE 255

/**
 * Snapshot: not mapped, or not readable.
 */
#define UHMM_SNAPSHOT_ERROR 255

/**
 * Snapshot: nothing that this device could use as it is.
 */
#define UHMM_SNAPSHOT_NONE 0

/**
 * Snapshot: readable.
 */
#define UHMM_SNAPSHOT_READ 1

/**
 * Snapshot: writable.
 */
#define UHMM_SNAPSHOT_WRITE 2

/**
 * Snapshot: part of a page of 2 MiB.
 */
#define UHMM_SNAPSHOT_PMD 4

/**
 * Snapshot: part of a page of 1 GiB.
 */
#define UHMM_SNAPSHOT_PUD 8

/**
 * Snapshot: the zero page.
 */
#define UHMM_SNAPSHOT_ZERO 16

/**
 * Snapshot: private memory of the device that was asked. Compare under UHMM_SNAPSHOT_WHERE.
 */
#define UHMM_SNAPSHOT_PRIVATE_LOCAL 32

/**
 * Snapshot: private memory of another device.
 */
#define UHMM_SNAPSHOT_PRIVATE_REMOTE 48

/**
 * Snapshot: coherent memory of the device that was asked.
 */
#define UHMM_SNAPSHOT_COHERENT_LOCAL 64

/**
 * Snapshot: coherent memory of another device.
 */
#define UHMM_SNAPSHOT_COHERENT_REMOTE 80

/**
 * Snapshot: the bits that say where the page is.
 */
#define UHMM_SNAPSHOT_WHERE 112

/**
 * Longest name of a counter, with its final zero.
 */
#define UHMM_METRIC_NAME_BYTES 64

/**
 * Trace: pages begin to move.
 */
#define UHMM_TRACE_MIGRATE_START 0

/**
 * Trace: they have moved, or stay; the page count is what moved.
 */
#define UHMM_TRACE_MIGRATE_END 1

/**
 * Trace: devices lost their mappings.
 */
#define UHMM_TRACE_INVALIDATE 2

/**
 * Trace: a fault was answered by waiting, because the block thrashes.
 */
#define UHMM_TRACE_THROTTLE 3

/**
 * Cause: the program asked.
 */
#define UHMM_CAUSE_PREFETCH 0

/**
 * Cause: a CPU fault.
 */
#define UHMM_CAUSE_CPU_FAULT 1

/**
 * Cause: a device fault.
 */
#define UHMM_CAUSE_DEVICE_FAULT 2

/**
 * Cause: a device was full.
 */
#define UHMM_CAUSE_EVICTION 3

/**
 * Cause: the address space changed (unmap, remap, fork, protection).
 */
#define UHMM_CAUSE_ADDRESS_SPACE 4

/**
 * Fails: the allocation of 2 MiB of device memory in one piece; small pieces are tried instead.
 */
#define UHMM_FAIL_HUGE_FRAMES 0

/**
 * Fails: the allocation of device memory.
 */
#define UHMM_FAIL_FRAMES 1

/**
 * Fails: the copy to a device.
 */
#define UHMM_FAIL_COPY_OUT 2

/**
 * Fails: the copy to system memory.
 */
#define UHMM_FAIL_COPY_HOME 3

/**
 * Fails: the allocation of a page of 2 MiB of system memory for pages that come home; small pages are tried instead.
 */
#define UHMM_FAIL_SYSTEM_HUGE 4

/**
 * Fails: the allocation of system memory for pages that come home; they stay on the device, and are tried again.
 */
#define UHMM_FAIL_SYSTEM_PAGES 5

/**
 * A device with a queue for a session: what uhmm_device_open() gives. May be used by all threads.
 */
typedef struct uhmm_device uhmm_device;

/**
 * One answer that is on its way: what the functions that do not wait give. Free it with uhmm_pending_free().
 */
typedef struct uhmm_pending uhmm_pending;

/**
 * A process under management: what uhmm_connect() gives. May be used by all threads.
 */
typedef struct uhmm_session uhmm_session;

/**
 * Memory of uhmm_allocate().
 */
typedef struct {
  /**
   * Number at the pager, as in `uhmm status`.
   */
  uint64_t region;
  /**
   * Length.
   */
  uint64_t len_bytes;
  /**
   * System memory that it takes now; falls when pages leave for a device.
   */
  uint64_t populated_bytes;
} uhmm_region_info;

/**
 * What uhmm_adopt_all() did.
 */
typedef struct {
  /**
   * Regions that this call made.
   */
  uint64_t region_count;
  /**
   * Bytes that this call put under management.
   */
  uint64_t bytes;
  /**
   * Bytes of private memory that were under management before.
   */
  uint64_t already_bytes;
  /**
   * Bytes that this call gave back, because a thread lives there now.
   */
  uint64_t given_back_bytes;
  /**
   * Bytes that were left alone, by UHMM_LEFT_*.
   */
  uint64_t left_alone_bytes[UHMM_LEFT_REASONS];
} uhmm_adopted_all;

/**
 * A range of addresses of this process.
 */
typedef struct {
  /**
   * First address, a multiple of the page size.
   */
  uint64_t addr;
  /**
   * Length, a multiple of the page size.
   */
  uint64_t len_bytes;
} uhmm_range;

/**
 * What a device is.
 */
typedef struct {
  /**
   * Name in the manifest.
   */
  char name[UHMM_NAME_BYTES];
  /**
   * Driver's name.
   */
  char driver[UHMM_NAME_BYTES];
  /**
   * Id in the plan: bit in masks, index in tables.
   */
  uint8_t id;
  /**
   * The CPU can see device memory.
   */
  bool aperture;
  /**
   * The CPU reaches allocated memory there without bringing it home.
   */
  bool coherent;
  /**
   * Device memory in bytes.
   */
  uint64_t memory_bytes;
  /**
   * Kernels that jobs can name, see uhmm_device_kernel().
   */
  size_t kernel_count;
} uhmm_device_info;

/**
 * What an access of a device met.
 */
typedef struct {
  /**
   * Pages of the range.
   */
  uint64_t page_count;
  /**
   * Device faults: 0 when all pages were there, 1 when one range fault brought all that was missing.
   */
  uint64_t fault_count;
} uhmm_access_report;

/**
 * What a migration did.
 */
typedef struct {
  /**
   * Pages that moved because of this request.
   */
  uint64_t moved_pages;
  /**
   * Pages of each fate, by UHMM_PAGE_*.
   */
  uint64_t pages[UHMM_PAGE_FATES];
} uhmm_migrate_report;

/**
 * What a job brought, beside its results.
 */
typedef struct {
  /**
   * Results that the kernel returned; the caller's array may hold fewer.
   */
  size_t result_count;
  /**
   * Device faults that the job met.
   */
  uint64_t fault_count;
  /**
   * Time on the device in nanoseconds, faults included.
   */
  uint64_t run_time_ns;
} uhmm_job_report;

/**
 * A range that a job uses, see uhmm_run_with().
 */
typedef struct {
  /**
   * First byte.
   */
  const void *addr;
  /**
   * Bytes; their pages are meant.
   */
  uint64_t len_bytes;
  /**
   * UHMM_JOB_READS or UHMM_JOB_WRITES.
   */
  uint32_t access;
} uhmm_job_range;

/**
 * What was advised for a range, and where it was prefetched to last. A field whose UHMM_MIXED_* bit is set has no one value and
 * holds its default.
 */
typedef struct {
  /**
   * UHMM_MIXED_* of the fields that differ inside the range.
   */
  uint32_t mixed;
  /**
   * Device id or UHMM_PLACE_*.
   */
  int32_t preferred;
  /**
   * Device id or UHMM_PLACE_*.
   */
  int32_t prefetched;
  /**
   * n for blocks of 2^n pages, or UHMM_GRANULARITY_ADAPTIVE.
   */
  uint32_t granularity;
  /**
   * Bit d: device d maps in place.
   */
  uint8_t in_place_mask;
  /**
   * Bit d: device d may not use the pages.
   */
  uint8_t no_access_mask;
  /**
   * See UHMM_ADVISE_READ_MOSTLY.
   */
  bool read_mostly;
  /**
   * See UHMM_ADVISE_DEVICE_READ_ONLY.
   */
  bool device_read_only;
  /**
   * See UHMM_ADVISE_PIN.
   */
  bool pinned;
} uhmm_attributes_info;

/**
 * Neighbouring pages of one residency.
 */
typedef struct {
  /**
   * Offset in pages from the start of the range.
   */
  uint64_t first_page;
  /**
   * Pages.
   */
  uint64_t page_count;
  /**
   * UHMM_RESIDENCY_*.
   */
  uint8_t residency;
  /**
   * Device id for UHMM_RESIDENCY_DEVICE, _EXCLUSIVE and _DUPLICATED, else UHMM_NO_DEVICE.
   */
  uint8_t device;
  /**
   * Bit d: device d maps the pages now.
   */
  uint8_t mapped_mask;
  /**
   * Pinned: stay in system memory.
   */
  bool pinned;
  /**
   * Kept as pages of 2 MiB on the device.
   */
  bool huge;
  /**
   * On a device, and the CPU reaches them there.
   */
  bool coherent;
} uhmm_residency_run;

/**
 * 2 MiB of memory that a device has used lately.
 */
typedef struct {
  /**
   * First address, a multiple of 2 MiB.
   */
  uint64_t addr;
  /**
   * Share of its pages that the device uses in 100 ms, 1 to 1000, on an average that halves with every 100 ms.
   */
  uint16_t heat_permille;
} uhmm_hot_range;

/**
 * One counter of a service.
 */
typedef struct {
  /**
   * Name; carries the unit.
   */
  char name[UHMM_METRIC_NAME_BYTES];
  /**
   * Value.
   */
  uint64_t value;
} uhmm_metric;

/**
 * One event in the life of pages.
 */
typedef struct {
  /**
   * Counts up by one; starts again at 1 with each start of the pager.
   */
  uint64_t sequence;
  /**
   * Nanoseconds of CLOCK_MONOTONIC.
   */
  uint64_t time_ns;
  /**
   * First address.
   */
  uint64_t addr;
  /**
   * Pages.
   */
  uint64_t page_count;
  /**
   * Where from: device id or UHMM_PLACE_HOME.
   */
  int32_t from;
  /**
   * Where to: device id or UHMM_PLACE_HOME.
   */
  int32_t to;
  /**
   * UHMM_TRACE_*.
   */
  uint8_t kind;
  /**
   * UHMM_CAUSE_*.
   */
  uint8_t cause;
} uhmm_trace_record;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * Writes the text of the calling thread's last failed call to `buffer` (at most `capacity` bytes with the final zero; longer
 * text is cut) and returns its full length in bytes without the zero. An empty text means that no call of this thread failed
 * yet; a call that succeeds leaves the text alone, but for migrations: pages of UHMM_PAGE_IO, UHMM_PAGE_NO_MEMORY and UHMM_PAGE_PINNED may
 * have stayed for a reason that is told here. With a capacity of 0, `buffer` may be null.
 */
size_t uhmm_last_error(char *buffer,
                       size_t capacity);

/**
 * Connects this process to the services in `run_dir` (NULL: $UHMM_RUN_DIR, else $XDG_RUNTIME_DIR/uhmm, else /tmp/uhmm-UID) and
 * puts it under management. One session a process is enough. It survives restarts of every service: calls wait for the service
 * to come back.
 *
 * Errors: -ENOTCONN no system runs there; -EPERM the run directory cannot be entered, or this account may not make a userfaultfd (the text says what
 * to change); -ETIMEDOUT its pager does not answer for ten seconds; -ENOMEM no memory, or no mapping left (vm.max_map_count); -EAGAIN no process or
 * thread can be made (pids.max, ulimit -u); the services' own.
 */
int uhmm_connect(const char *run_dir,
                 uhmm_session **session);

/**
 * Ends a session and frees all memory that uhmm_allocate() gave: its addresses are gone. Adopted memory comes home with its bytes and is the
 * program's alone. That is waited for, ten seconds at most and not at all while the pager is away; then it goes on by itself. Devices
 * and pending calls of the session stay usable until they are closed and freed, and the session lives as long as they do; so it does in a forked
 * child as long as that has memory which its parent allocated.
 * A call that another thread is inside ends first. In a forked child, a handle of the parent is left alone and 0 is answered.
 *
 * Errors: -EINVAL a wrong handle.
 */
int uhmm_disconnect(uhmm_session *session);

/**
 * After fork(), in the child: a session of its own on the inherited address space. `parents` is the session that the process
 * had when it called fork(); all of the parent's handles are refused in the child from then on. Memory that the parent
 * adopted is under management in the child too.
 *
 * Errors: -EINVAL `parents` is of this very process; -ENOENT the kernel grants no fork events (see uhmm_fork_supported()): the managed ranges are
 * not in the child; as uhmm_connect().
 */
int uhmm_in_child(uhmm_session *parents,
                  uhmm_session **session);

/**
 * Whether a child made by fork() keeps the managed memory (1) or finds those addresses unmapped (0). Depends on what the kernel
 * grants to this account: `uhmm doctor` says what would change it.
 *
 * Errors: -EINVAL a wrong handle.
 */
int uhmm_fork_supported(uhmm_session *session);

/**
 * Whether system calls may be given migrated memory: 1, the kernel waits for the page as the program does; 0, they fail
 * with EFAULT until the page is touched. `uhmm doctor` says what would change it.
 *
 * Errors: -EINVAL a wrong handle.
 */
int uhmm_system_calls_wait(uhmm_session *session);

/**
 * This process's number at the pager, as in `uhmm status`.
 *
 * Errors: -EINVAL a wrong handle or pointer.
 */
int uhmm_space(uhmm_session *session, uint64_t *space);

/**
 * Who takes private pages out of this process's address space and puts them back. `pid`: the number of the agent, a process that shares this
 * one's memory and nothing else; 0 when the agent is a thread of this process, because making a process is forbidden here (a
 * seccomp filter); -1 when it was killed and no other one can be started: then private memory moves to no device any more, and
 * what is on one comes home when it is touched.
 *
 * Errors: -ESTALE the session's own thread was killed.
 */
int uhmm_agent(uhmm_session *session,
               int64_t *pid);

/**
 * Test hook: the session's agent stands still for this long. Returns at once.
 *
 * Errors: -EINVAL a wrong handle.
 */
int uhmm_pause_agent(uhmm_session *session, uint32_t duration_ms);

/**
 * Allocates zeroed, managed, shared memory; `len_bytes` is a multiple of the page size. Pages cost nothing before they are
 * touched.
 *
 * Errors: -EINVAL the length; -ENOMEM no memory, no mapping left (vm.max_map_count), or the quota of this process; the services' own.
 */
int uhmm_allocate(uhmm_session *session,
                  uint64_t len_bytes,
                  void **addr);

/**
 * Frees what uhmm_allocate() gave, as a whole, on every device too. Its addresses are gone.
 *
 * Errors: -ENOENT no allocation of this session begins there; the services' own.
 */
int uhmm_free(uhmm_session *session, void *addr);

/**
 * What uhmm_allocate() gave at `addr`.
 *
 * Errors: -ENOENT no allocation of this session begins there; the services' own.
 */
int uhmm_region(uhmm_session *session, const void *addr, uhmm_region_info *info);

/**
 * Puts memory that exists already under management, in place: addresses and bytes stay what they are. What is under management
 * already stays so. Private anonymous memory
 * (malloc'd in whole pages, mmapped) can migrate; shared mappings of files, and shared memory of huge pages (MAP_HUGETLB), are
 * used by devices in place. Private MAP_HUGETLB memory is refused.
 *
 * Errors: -ENOMEM no mapping left (vm.max_map_count), or a quota of the manifest's; the services' own. -EINVAL not whole pages, several mappings of which some are shared, or a kind of memory that cannot be managed (private memory of
 * files or of huge pages, executable, growing downwards, the kernel's); -EFAULT a hole; -EPERM memory that must not be managed: libuhmm's own,
 * stacks and control blocks of threads (the kernel writes there when a thread ends and cannot wait for a page), and where
 * uhmm_system_calls_wait() is 0, the calling thread's alternate signal stack and the heap that holds libuhmm's own objects. The text says
 * which part of the range it is, why, and what can be done.
 */
int uhmm_adopt(uhmm_session *session,
               void *addr,
               uint64_t len_bytes);

/**
 * Gives adopted memory, or a part of it, back to the kernel alone: its pages come home first and stay. What is not adopted stays
 * as it is.
 *
 * Errors: -EINVAL not whole pages, or a range with memory of uhmm_allocate() among other; -EIO pages are lost, or could not be copied home; the
 * services' own.
 */
int uhmm_release(uhmm_session *session,
                 void *addr,
                 uint64_t len_bytes);

/**
 * The bytes of a range are not needed any more: it reads as zero from now on and costs no memory anywhere.
 *
 * Errors: -EINVAL not whole pages, or not mapped; -EFAULT shared memory of which nothing is managed; the services' own.
 */
int uhmm_discard(uhmm_session *session, void *addr, uint64_t len_bytes);

/**
 * mprotect(2) that devices obey too when it returns: `protection` is 0, UHMM_PROTECT_READ, or UHMM_PROTECT_READ |
 * UHMM_PROTECT_WRITE. (A plain mprotect counts from the next access or kernel of a device on;
 * a kernel that runs already may go on until its next fault.)
 *
 * Errors: -EINVAL not whole pages, or another protection; -EPERM the mapping does not allow it; -ENOMEM a hole, or no mapping left
 * (vm.max_map_count); -EFAULT not managed (the protection is changed nevertheless); the services' own.
 */
int uhmm_protect(uhmm_session *session,
                 void *addr,
                 uint64_t len_bytes,
                 uint32_t protection);

/**
 * Brings a range home and keeps it there until uhmm_unpin(): for memory that I/O refers to (O_DIRECT, RDMA, registered io_uring
 * buffers), which nobody but the program knows of.
 *
 * Errors: -EINVAL not whole pages, or a part that is not managed; -EFAULT nothing of it is managed; the services' own.
 */
int uhmm_pin(uhmm_session *session,
             const void *addr,
             uint64_t len_bytes);

/**
 * Ends uhmm_pin(), with the same errors.
 *
 * Errors: as uhmm_pin().
 */
int uhmm_unpin(uhmm_session *session, const void *addr, uint64_t len_bytes);

/**
 * Puts all private anonymous memory of this process under management (heap, arenas, mmapped memory), but what must not be, and what
 * appears later too: a thread of libuhmm's looks for it until uhmm_disconnect(), twenty times a second while the address space changes. All of
 * that thread's signals are blocked. What is adopted stays so; what uhmm_release() gives back is left alone from then on. May be called
 * again, to have new memory adopted at once. A forked child keeps what was adopted, and looks for more when it calls this with its own session.
 * `report` may be NULL.
 *
 * Errors: -EPERM uhmm_system_calls_wait() or uhmm_fork_supported() is 0, so the program would break (the text says what to change); -EIO
 * /proc cannot be read. A mapping that cannot be adopted is no error: see left_alone_bytes.
 */
int uhmm_adopt_all(uhmm_session *session,
                   uhmm_adopted_all *report);

/**
 * The private memory of this process that is under management now, in order of address, neighbours joined. At most `capacity` ranges are copied
 * to `ranges`; `range_count` gets how many there are, which may be more. With a capacity of 0, `ranges` may be NULL.
 *
 * Errors: -EINVAL a wrong handle or pointer.
 */
int uhmm_adopted_ranges(uhmm_session *session,
                        uhmm_range *ranges,
                        uint64_t capacity,
                        uint64_t *range_count);

/**
 * Opens a queue on a device by its name in the manifest. It survives restarts of its driver.
 *
 * Errors: -EINVAL not a name; -ENOENT no such device; -EPERM the run directory cannot be entered; -ETIMEDOUT its driver does not answer for ten
 * seconds; the services' own.
 */
int uhmm_device_open(uhmm_session *session,
                     const char *name,
                     uhmm_device **device);

/**
 * Closes a device's handle. Pages stay where they are. In a forked child, a handle of the parent is left alone.
 *
 * Errors: -EINVAL a wrong handle.
 */
int uhmm_device_close(uhmm_device *device);

/**
 * What a device is.
 *
 * Errors: -EINVAL a wrong handle or pointer.
 */
int uhmm_device_describe(uhmm_device *device, uhmm_device_info *info);

/**
 * One line about the kernel number `index` (from 0): its name and arguments. At most `capacity` bytes with the final zero are
 * written; longer text is cut.
 *
 * Errors: -ENOENT the device has not that many kernels; -EINVAL a wrong handle or pointer.
 */
int uhmm_device_kernel(uhmm_device *device,
                       size_t index,
                       char *usage,
                       size_t capacity);

/**
 * The device reads `len_bytes` (whole pages) at the program's address `addr` and the bytes are copied to `into`. Pages that are not
 * on the device are faulted in, all with one range fault. `report` may be NULL.
 *
 * Errors: -EFAULT not mapped, not readable, behind the end of its file, or not managed; -EPERM the device may not use a page (advice, or a coherent
 * device that serves another user); -EINVAL not whole pages; -ENOMEM the device is full, or no memory for the bytes on their way; -EBUSY others took
 * the pages away again and again, for a second; -EIO the device is lost or has failed; the services' own.
 */
int uhmm_device_read(uhmm_device *device,
                     const void *addr,
                     void *into,
                     uint64_t len_bytes,
                     uhmm_access_report *report);

/**
 * The device writes `len_bytes` (whole pages) from `from` to the program's address `addr`. `report` may be NULL.
 *
 * Errors: as uhmm_device_read(); -EPERM also when the mapping is read-only, or its file may not be written (sealed, a read-only file system).
 * Nothing is written when a part of the range cannot be (as far as the device has room for all of it).
 */
int uhmm_device_write(uhmm_device *device,
                      void *addr,
                      const void *from,
                      uint64_t len_bytes,
                      uhmm_access_report *report);

/**
 * The device adds `value` to every 8-byte word of a range (whole pages), wrapping. `before` gets the words from before: room for
 * len_bytes / 8 of them, or NULL. `report` may be NULL. Not repeated by itself: -ESTALE when the driver died meanwhile.
 *
 * Errors: as uhmm_device_write(); -ESTALE the driver died meanwhile: it may or may not be done; -EINVAL also memory of a file, where nothing can be
 * added atomically.
 */
int uhmm_device_fetch_add(uhmm_device *device,
                          void *addr,
                          uint64_t len_bytes,
                          uint64_t value,
                          uint64_t *before,
                          uhmm_access_report *report);

/**
 * Makes the pages of a range the device's alone, for its atomics, until the program touches them, forks, changes their protection, or
 * another device takes them. `report` may be NULL.
 *
 * Errors: as uhmm_device_write(); -EBUSY also memory that stays in place.
 */
int uhmm_device_exclusive(uhmm_device *device,
                          void *addr,
                          uint64_t len_bytes,
                          uhmm_access_report *report);

/**
 * Whether no page of a range is any device's alone: 0, or -EPERM while one is.
 *
 * Errors: -EINVAL not whole pages, or a part that is not managed; -EFAULT nothing of it is managed; the services' own.
 */
int uhmm_check_exclusive(uhmm_session *session, const void *addr, uint64_t len_bytes);

/**
 * Lets the device fault a range in, so that it lies on the device afterwards (but for pages that advice keeps elsewhere) and is mapped there.
 * `report` may be NULL.
 *
 * Errors: as uhmm_device_read().
 */
int uhmm_fault_and_migrate(uhmm_device *device,
                           const void *addr,
                           uint64_t len_bytes,
                           uhmm_access_report *report);

/**
 * uhmm_device_read() of what the device maps already: nothing is faulted in or moved. Reads up to the first page that it does not map;
 * `page_count` gets how many pages were read.
 *
 * Errors: -ENOENT the device does not map the first page; -EINVAL not whole pages; -EIO the device is lost or has failed; the services' own.
 */
int uhmm_device_peek(uhmm_device *device,
                     const void *addr,
                     void *into,
                     uint64_t len_bytes,
                     uint64_t *page_count);

/**
 * uhmm_device_read() without waiting: the bytes come with uhmm_pending_accessed(). A `deadline_ms` of 0 is none; after it the answer
 * is -ETIMEDOUT.
 *
 * Errors: -EINVAL not whole pages; -ENOMEM no memory for the bytes on their way. The access's own come with its answer.
 */
int uhmm_device_read_async(uhmm_device *device,
                           const void *addr,
                           uint64_t len_bytes,
                           uint32_t deadline_ms,
                           uhmm_pending **pending);

/**
 * uhmm_device_write() without waiting: the answer comes with uhmm_pending_accessed(). `from` is copied before this returns.
 *
 * Errors: as uhmm_device_read_async().
 */
int uhmm_device_write_async(uhmm_device *device,
                            void *addr,
                            const void *from,
                            uint64_t len_bytes,
                            uint32_t deadline_ms,
                            uhmm_pending **pending);

/**
 * uhmm_device_fetch_add() without waiting: the words from before come with uhmm_pending_accessed().
 *
 * Errors: as uhmm_device_read_async().
 */
int uhmm_device_fetch_add_async(uhmm_device *device,
                                void *addr,
                                uint64_t len_bytes,
                                uint64_t value,
                                uint32_t deadline_ms,
                                uhmm_pending **pending);

/**
 * uhmm_device_exclusive() without waiting: the answer comes with uhmm_pending_accessed().
 *
 * Errors: -EINVAL not whole pages. The access's own come with its answer.
 */
int uhmm_device_exclusive_async(uhmm_device *device,
                                void *addr,
                                uint64_t len_bytes,
                                uint32_t deadline_ms,
                                uhmm_pending **pending);

/**
 * Migrates a range to `device` (NULL: home, to system memory) and waits. Addresses stay what they are. Partial success is 0: look
 * at the report. `fates` gets one UHMM_PAGE_* a page; it has room for `capacity` of them, at least as many as the range has pages,
 * or is NULL with capacity 0. `report` may be NULL.
 *
 * Errors: -EINVAL not whole pages, or a part that is not managed; -EFAULT nothing of it is managed, or not mapped and readable; -ENOENT memory of
 * files, which devices use in place; -EPERM a coherent device that serves another user; -EIO the agent is gone (see uhmm_agent()); the services'
 * own.
 */
int uhmm_migrate(uhmm_session *session,
                 const void *addr,
                 uint64_t len_bytes,
                 uhmm_device *device,
                 uhmm_migrate_report *report,
                 uint8_t *fates,
                 size_t capacity);

/**
 * uhmm_migrate() of some of the pages, as a kernel driver selects them: `flags` are UHMM_MIGRATE_*, `device` is the one that they name. Pages that
 * are left out have the fate UHMM_PAGE_NOT_SELECTED, and those that are where they shall be UHMM_PAGE_ALREADY_THERE.
 *
 * Errors: as uhmm_migrate(); -EINVAL also flags that do not go together; with UHMM_MIGRATE_AND_MAP those of uhmm_fault_and_migrate().
 */
int uhmm_migrate_some(uhmm_session *session,
                      const void *addr,
                      uint64_t len_bytes,
                      uhmm_device *device,
                      uint32_t flags,
                      uhmm_migrate_report *report,
                      uint8_t *fates,
                      size_t capacity);

/**
 * uhmm_migrate() without waiting: the answer comes through `pending`, see uhmm_pending_migrated(). The memory can be used
 * meanwhile; a page that is touched waits for its own copy.
 *
 * Errors: -EINVAL not whole pages. The migration's own come with its answer.
 */
int uhmm_migrate_async(uhmm_session *session,
                       const void *addr,
                       uint64_t len_bytes,
                       uhmm_device *device,
                       uhmm_pending **pending);

/**
 * Brings a range to `device` (NULL: home) ahead of its use there and waits; the place is noted as the pages' prefetch location (see
 * uhmm_attributes()). `report` may be NULL.
 *
 * Errors: as uhmm_migrate().
 */
int uhmm_prefetch(uhmm_session *session,
                  const void *addr,
                  uint64_t len_bytes,
                  uhmm_device *device,
                  uhmm_migrate_report *report);

/**
 * uhmm_prefetch() without waiting: the answer comes through `pending`, see uhmm_pending_migrated().
 *
 * Errors: as uhmm_migrate_async().
 */
int uhmm_prefetch_async(uhmm_session *session,
                        const void *addr,
                        uint64_t len_bytes,
                        uhmm_device *device,
                        uhmm_pending **pending);

/**
 * Brings pages of this process home from a device, coldest first: `page_count` of them, 0 for all. `evicted_pages` gets how
 * many came; it may be NULL.
 *
 * Errors: -EINVAL a wrong handle or pointer; the services' own.
 */
int uhmm_evict(uhmm_session *session,
               uhmm_device *device,
               uint64_t page_count,
               uint64_t *evicted_pages);

/**
 * Brings every page of this process home and keeps it there (`stay`), or lets pages leave again. For whatever reads this process in ways that
 * cannot wait for a page: ptrace, /proc/PID/mem, gcore, a core dump. Meanwhile migrations to devices leave all pages where they are
 * (UHMM_PAGE_PINNED), and jobs that need a page wait. `uhmm home PID` does the same from outside. `moved_pages` gets how many came; it may be
 * NULL.
 *
 * Errors: -EIO pages could not be copied home, the rest is there; the services' own.
 */
int uhmm_stay_home(uhmm_session *session,
                   bool stay,
                   uint64_t *moved_pages);

/**
 * Before a signal ends this process whose default action is a core dump (SIGSEGV, SIGBUS, SIGABRT and so on), every page comes home, so that the
 * core file has it; that takes `patience_ms` at most. Signals that the program handles, ignores or handles later are left alone, and so are
 * forked children. The handlers run on the alternate signal stack of the thread, if it has one. Costs nothing before a signal comes.
 *
 * Errors: -EIO sigaction(2) was refused; the services' own.
 */
int uhmm_home_on_fatal_signals(uhmm_session *session,
                               uint32_t patience_ms);

/**
 * Brings every page of every process home from a device, as a driver does before its device is taken away. Devices may fetch pages again:
 * advice and uhmm_stay_home() keep them. `moved_pages` gets how many came; it may be NULL.
 *
 * Errors: -ENOTCONN no system runs any more; -EPERM the run directory cannot be entered; the services' own.
 */
int uhmm_empty_device(uhmm_session *session,
                      uhmm_device *device,
                      uint64_t *moved_pages);

/**
 * Runs a kernel and waits. `args` are its `arg_count` arguments: pointers, lengths, constants, as uhmm_device_kernel() lists them.
 * Nothing has to be moved before. `flags` is 0 or UHMM_JOB_IDEMPOTENT; a `deadline_ms` of 0 is none. At most `capacity` results are
 * copied to `results` (may be NULL with capacity 0). `report` may be NULL.
 *
 * Errors: -ENOENT no such kernel; -EINVAL its arguments; -EFAULT, -EPERM, -ENOMEM, -EBUSY, -EIO of its faults, as uhmm_device_read(); -ETIMEDOUT the
 * deadline passed; -ESTALE the driver died and the job is not idempotent; the services' own.
 */
int uhmm_run(uhmm_device *device,
             const char *kernel,
             const uint64_t *args,
             size_t arg_count,
             uint32_t flags,
             uint32_t deadline_ms,
             uhmm_job_report *report,
             uint64_t *results,
             size_t capacity);

/**
 * uhmm_run() without waiting: the answer comes through `pending`, see uhmm_pending_finished().
 *
 * Errors: -EINVAL a wrong handle, pointer, text or flag. The job's own come with its answer.
 */
int uhmm_submit(uhmm_device *device,
                const char *kernel,
                const uint64_t *args,
                size_t arg_count,
                uint32_t flags,
                uint32_t deadline_ms,
                uhmm_pending **pending);

/**
 * uhmm_run() of a job that names what it uses: the pages of its `range_count` ranges (at most 64) are brought to the device and mapped there
 * before it starts, which costs a small part of faulting them in. What is not named, does not fit (half of the device's memory) or is taken
 * away again is faulted in as ever; what cannot be brought fails the job only if it touches it.
 *
 * Errors: as uhmm_run(); -EINVAL also the ranges.
 */
int uhmm_run_with(uhmm_device *device,
                  const char *kernel,
                  const uint64_t *args,
                  size_t arg_count,
                  const uhmm_job_range *ranges,
                  size_t range_count,
                  uint32_t flags,
                  uint32_t deadline_ms,
                  uhmm_job_report *report,
                  uint64_t *results,
                  size_t capacity);

/**
 * uhmm_run_with() without waiting: the answer comes through `pending`, see uhmm_pending_finished().
 *
 * Errors: -EINVAL a wrong handle, pointer, text, flag or range. The job's own come with its answer.
 */
int uhmm_submit_with(uhmm_device *device,
                     const char *kernel,
                     const uint64_t *args,
                     size_t arg_count,
                     const uhmm_job_range *ranges,
                     size_t range_count,
                     uint32_t flags,
                     uint32_t deadline_ms,
                     uhmm_pending **pending);

/**
 * Whether the answer is here: 1, or 0 while it is not.
 *
 * Errors: -EINVAL a wrong handle.
 */
int uhmm_pending_poll(uhmm_pending *pending);

/**
 * Waits until the answer is here: 1, or 0 when it is not after `timeout_ms` (the call goes on). Negative: waits as long as it
 * takes.
 *
 * Errors: -EINVAL a wrong handle.
 */
int uhmm_pending_wait(uhmm_pending *pending,
                      int64_t timeout_ms);

/**
 * Frees the handle. The call is not cancelled. In a forked child, a handle of the parent is left alone.
 *
 * Errors: -EINVAL a wrong handle.
 */
int uhmm_pending_free(uhmm_pending *pending);

/**
 * The answer of uhmm_migrate_async() or uhmm_prefetch_async(), with the arguments and errors of uhmm_migrate(). Can be asked
 * more than once.
 *
 * Errors: -EBUSY it is not here yet; -EINVAL another kind of answer, or too little room; the call's own, as uhmm_migrate().
 */
int uhmm_pending_migrated(uhmm_pending *pending,
                          uhmm_migrate_report *report,
                          uint8_t *fates,
                          size_t capacity);

/**
 * The answer of uhmm_submit(), with the arguments and errors of uhmm_run(). Can be asked more than once.
 *
 * Errors: -EBUSY it is not here yet; -EINVAL another kind of answer; the job's own, as uhmm_run().
 */
int uhmm_pending_finished(uhmm_pending *pending, uhmm_job_report *report, uint64_t *results, size_t capacity);

/**
 * The answer of uhmm_device_read_async() and its like. What was read (or the words from before a fetch-add) is copied to `into`, which has
 * room for `len_bytes`: at least as much as there is, or NULL with length 0. `report` may be NULL. Can be asked more than once.
 *
 * Errors: -EBUSY it is not here yet; -EINVAL another kind of answer, or too little room; the access's own, as uhmm_device_read() and its like;
 * -ETIMEDOUT the deadline passed.
 */
int uhmm_pending_accessed(uhmm_pending *pending,
                          void *into,
                          uint64_t len_bytes,
                          uhmm_access_report *report);

/**
 * Says how a range will be used: `advice` is UHMM_ADVISE_*; `device` and `value` are what it says there, else NULL and 0. The same
 * advice again changes nothing.
 *
 * Errors: -EINVAL not whole pages, or a part that is not managed; -EFAULT nothing of it is managed, or an advice, device or value that do not go
 * together; the services' own.
 */
int uhmm_advise(uhmm_session *session,
                const void *addr,
                uint64_t len_bytes,
                uint32_t advice,
                uhmm_device *device,
                uint32_t value);

/**
 * What was advised for a range.
 *
 * Errors: -EINVAL not whole pages, or a part that is not managed; -EFAULT nothing of it is managed; the services' own.
 */
int uhmm_attributes(uhmm_session *session, const void *addr, uint64_t len_bytes, uhmm_attributes_info *attributes);

/**
 * Where the pages of a range are, in order and without gaps; they may move while this is written. At most `capacity` runs are
 * copied to `runs`; `run_count` gets how many there are, which may be more.
 *
 * Errors: -EINVAL not whole pages, or a part that is not managed; -EFAULT nothing of it is managed; the services' own.
 */
int uhmm_residency(uhmm_session *session,
                   const void *addr,
                   uint64_t len_bytes,
                   uhmm_residency_run *runs,
                   size_t capacity,
                   size_t *run_count);

/**
 * One byte of UHMM_SNAPSHOT_* for each page of a range, as `device` sees it. Nothing is faulted in or moved. `pages` has room for
 * `capacity` bytes, at least as many as the range has pages. Parts of the range may be unmapped or not under management.
 *
 * Errors: -EINVAL not whole pages, or too little room; the services' own.
 */
int uhmm_snapshot(uhmm_session *session,
                  uhmm_device *device,
                  const void *addr,
                  uint64_t len_bytes,
                  uint8_t *pages,
                  size_t capacity);

/**
 * What a device uses of this process's memory, hottest first. The first call begins the watching and tells what was used up to now;
 * it goes on until five seconds after the last call. At most `capacity` ranges are copied to `ranges`; `range_count` gets how many
 * there are, which may be more. A restart of the pager forgets the heat and nothing else.
 *
 * Errors: -ENOENT the device has no aperture, so nobody but its driver knows; the services' own.
 */
int uhmm_hot_ranges(uhmm_session *session,
                    uhmm_device *device,
                    uhmm_hot_range *ranges,
                    size_t capacity,
                    size_t *range_count);

/**
 * All counters of a service: "supervisor", "pager", "mirror" or a device's name. At most `capacity` are copied to `metrics`;
 * `metric_count` gets how many there are, which may be more.
 *
 * Errors: -ENOTCONN no system runs any more; -ENOENT no such service; -EPERM the run directory cannot be entered; -ETIMEDOUT it does not answer for
 * ten seconds.
 */
int uhmm_stats(uhmm_session *session,
               const char *service,
               uhmm_metric *metrics,
               size_t capacity,
               size_t *metric_count);

/**
 * One counter of a service, by name.
 *
 * Errors: as uhmm_stats(); -ENOENT also when there is no such counter.
 */
int uhmm_stat(uhmm_session *session, const char *service, const char *name, uint64_t *value);

/**
 * What happened to this process's pages, from sequence number `since` on (0: all that is remembered). At most `capacity` records are
 * copied to `records`, and `record_count` gets how many were: ask again from the last sequence number plus 1, until it is 0.
 *
 * Errors: -EINVAL a wrong handle or pointer; the services' own.
 */
int uhmm_read_trace(uhmm_session *session,
                    uint64_t since,
                    uhmm_trace_record *records,
                    size_t capacity,
                    size_t *record_count);

/**
 * Test hook: the `nth` allocation or copy (UHMM_FAIL_*) for this process from now on fails, 1 being the next one; 0 disarms.
 *
 * Errors: -EPERM the manifest does not say `fault_injection = true`; -EINVAL the point; the services' own.
 */
int uhmm_inject(uhmm_session *session,
                uint32_t point,
                uint32_t nth);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* UHMM_H */
