/* Policy and what can be asked: advice, pins, eviction, residency, snapshots, counters, the trace. */
#define _GNU_SOURCE
#include "check.h"

void advice(const struct bench *bench)
{
    const uint64_t len = 16 * PAGE, half = len / 2;
    uint8_t *memory = NULL;
    uint64_t buffer[UHMM_PAGE_BYTES / 8];
    uhmm_session *s = bench->session;
    uhmm_attributes_info now;

    OK(uhmm_allocate(s, len, (void **)&memory));
    fill(memory, len, 40);
    OK(uhmm_attributes(s, memory, len, &now));
    SAME(now.mixed, 0);
    SAME(now.preferred, UHMM_PLACE_NONE);
    SAME(now.prefetched, UHMM_PLACE_NONE);
    SAME(now.granularity, UHMM_GRANULARITY_ADAPTIVE);
    SAME(now.in_place_mask | now.no_access_mask, 0);
    TRUE_THAT(!now.read_mostly && !now.device_read_only && !now.pinned);

    /* Half of the range: each field alone becomes mixed. */
    const struct {
        uint32_t advice, value, undo, undo_value, mixed;
        bool device;
    } changes[] = {
        {UHMM_ADVISE_PREFER, 0, UHMM_ADVISE_PREFER_NONE, 0, UHMM_MIXED_PREFERRED, false},
        {UHMM_ADVISE_READ_MOSTLY, 1, UHMM_ADVISE_READ_MOSTLY, 0, UHMM_MIXED_READ_MOSTLY, false},
        {UHMM_ADVISE_DEVICE_READ_ONLY, 0, UHMM_ADVISE_DEVICE_READ_WRITE, 0, UHMM_MIXED_DEVICE_READ_ONLY, false},
        {UHMM_ADVISE_IN_PLACE, 0, UHMM_ADVISE_MIGRATE_ON_FAULT, 0, UHMM_MIXED_IN_PLACE, false},
        {UHMM_ADVISE_ACCESS, UHMM_ACCESS_NONE, UHMM_ADVISE_ACCESS, UHMM_ACCESS_MIGRATE, UHMM_MIXED_NO_ACCESS, true},
        {UHMM_ADVISE_ACCESS, UHMM_ACCESS_IN_PLACE, UHMM_ADVISE_ACCESS, UHMM_ACCESS_MIGRATE, UHMM_MIXED_IN_PLACE, true},
        {UHMM_ADVISE_GRANULARITY, 9, UHMM_ADVISE_GRANULARITY, UHMM_GRANULARITY_ADAPTIVE, UHMM_MIXED_GRANULARITY, false},
        {UHMM_ADVISE_PIN, 0, UHMM_ADVISE_UNPIN, 0, UHMM_MIXED_PINNED, false},
    };
    for (size_t i = 0; i < sizeof changes / sizeof changes[0]; i++) {
        uhmm_device *device = changes[i].device ? bench->device : NULL;
        OK(uhmm_advise(s, memory, half, changes[i].advice, device, changes[i].value));
        OK(uhmm_attributes(s, memory, len, &now));
        SAME(now.mixed, changes[i].mixed);
        OK(uhmm_advise(s, memory + half, half, changes[i].advice, device, changes[i].value));
        OK(uhmm_attributes(s, memory, len, &now));
        SAME(now.mixed, 0);
        SAME(now.preferred, i == 0 ? UHMM_PLACE_HOME : UHMM_PLACE_NONE);
        SAME(now.read_mostly, i == 1);
        SAME(now.device_read_only, i == 2);
        TRUE_THAT((now.in_place_mask & 1) == (i == 3 || i == 5));
        SAME(now.no_access_mask, i == 4);
        SAME(now.granularity, i == 6 ? 9 : UHMM_GRANULARITY_ADAPTIVE);
        SAME(now.pinned, i == 7);
        OK(uhmm_advise(s, memory, len, changes[i].undo, device, changes[i].undo_value));
        OK(uhmm_attributes(s, memory, len, &now));
        SAME(now.mixed, 0);
    }
    OK(uhmm_advise(s, memory, len, UHMM_ADVISE_PREFER, bench->device, 0));
    OK(uhmm_prefetch(s, memory, half, bench->device, NULL));
    OK(uhmm_attributes(s, memory, len, &now));
    SAME(now.preferred, 0);
    SAME(now.mixed, UHMM_MIXED_PREFETCHED);
    OK(uhmm_attributes(s, memory, half, &now));
    SAME(now.prefetched, 0);
    OK(uhmm_advise(s, memory, len, UHMM_ADVISE_PREFER_NONE, NULL, 0));
    OK(uhmm_prefetch(s, memory, len, NULL, NULL));

    /* What advice does to a device. */
    OK(uhmm_advise(s, memory, PAGE, UHMM_ADVISE_ACCESS, bench->device, UHMM_ACCESS_NONE));
    FAILS(uhmm_device_read(bench->device, memory, buffer, PAGE, NULL), EPERM);
    OK(uhmm_advise(s, memory, PAGE, UHMM_ADVISE_ACCESS, bench->device, UHMM_ACCESS_IN_PLACE));
    OK(uhmm_device_read(bench->device, memory, buffer, PAGE, NULL));
    EXPECT(buffer, PAGE, 40);
    EXPECT_RESIDENCY(s, memory, PAGE, UHMM_RESIDENCY_SYSTEM);
    OK(uhmm_advise(s, memory, PAGE, UHMM_ADVISE_ACCESS, bench->device, UHMM_ACCESS_MIGRATE));
    OK(uhmm_advise(s, memory, PAGE, UHMM_ADVISE_DEVICE_READ_ONLY, NULL, 0));
    FAILS(uhmm_device_write(bench->device, memory, buffer, PAGE, NULL), EPERM);
    OK(uhmm_advise(s, memory, PAGE, UHMM_ADVISE_DEVICE_READ_WRITE, NULL, 0));
    OK(uhmm_prefetch(s, memory, PAGE, NULL, NULL));
    /* Mostly read: the device gets a copy, the first write ends it. */
    OK(uhmm_advise(s, memory, PAGE, UHMM_ADVISE_READ_MOSTLY, NULL, 1));
    OK(uhmm_device_read(bench->device, memory, buffer, PAGE, NULL));
    EXPECT_RESIDENCY(s, memory, PAGE, UHMM_RESIDENCY_DUPLICATED);
    EXPECT(memory, PAGE, 40);
    fill(memory, PAGE, 41);
    OK(uhmm_device_read(bench->device, memory, buffer, PAGE, NULL));
    EXPECT(buffer, PAGE, 41);

    FAILS(uhmm_advise(s, memory, len, 11, NULL, 0), EINVAL);
    FAILS(uhmm_advise(s, memory, len, UHMM_ADVISE_PIN, NULL, 1), EINVAL);
    FAILS(uhmm_advise(s, memory, len, UHMM_ADVISE_PIN, bench->device, 0), EINVAL);
    FAILS(uhmm_advise(s, memory, len, UHMM_ADVISE_ACCESS, NULL, 0), EINVAL);
    FAILS(uhmm_advise(s, memory, len, UHMM_ADVISE_ACCESS, bench->device, 3), EINVAL);
    FAILS(uhmm_advise(s, memory, len, UHMM_ADVISE_READ_MOSTLY, NULL, 2), EINVAL);
    FAILS(uhmm_advise(s, memory, len, UHMM_ADVISE_GRANULARITY, NULL, 64), EINVAL);
    FAILS(uhmm_advise(s, memory, 1, UHMM_ADVISE_UNPIN, NULL, 0), EINVAL);
    FAILS(uhmm_attributes(s, memory, len, NULL), EINVAL);
    FAILS(uhmm_attributes(s, memory, 0, &now), EINVAL);
    OK(uhmm_free(s, memory));
}

void pins_and_eviction(const struct bench *bench)
{
    const uint64_t len = MIB, pages = len / PAGE;
    uint8_t *memory = anonymous(len), fates[MIB / UHMM_PAGE_BYTES];
    uhmm_migrate_report report;
    uhmm_residency_run runs[8];
    uint64_t evicted = 0;
    size_t count = 0;

    fill(memory, len, 50);
    OK(uhmm_adopt(bench->session, memory, len));
    OK(uhmm_migrate(bench->session, memory, len, bench->device, NULL, NULL, 0));
    OK(uhmm_pin(bench->session, memory, len / 2));
    OK(uhmm_residency(bench->session, memory, len, runs, 8, &count));
    SAME(count, 2);
    SAME(runs[0].residency, UHMM_RESIDENCY_SYSTEM);
    SAME(runs[0].device, UHMM_NO_DEVICE);
    SAME(runs[0].pinned, true);
    SAME(runs[0].page_count, pages / 2);
    SAME(runs[1].first_page, pages / 2);
    SAME(runs[1].residency, UHMM_RESIDENCY_DEVICE);
    SAME(runs[1].device, 0);
    SAME(runs[1].pinned, false);
    /* Room for one: the count is still the whole, and nothing is written behind it. */
    runs[1].first_page = 12345;
    OK(uhmm_residency(bench->session, memory, len, runs, 1, &count));
    SAME(count, 2);
    SAME(runs[1].first_page, 12345);
    OK(uhmm_residency(bench->session, memory, len, NULL, 0, &count));
    SAME(count, 2);
    FAILS(uhmm_residency(bench->session, memory, len, runs, 8, NULL), EINVAL);
    FAILS(uhmm_residency(bench->session, memory, 0, runs, 8, &count), EINVAL);

    OK(uhmm_migrate(bench->session, memory, len, bench->device, &report, fates, sizeof fates));
    SAME(report.pages[UHMM_PAGE_PINNED], pages / 2);
    SAME(report.pages[UHMM_PAGE_ALREADY_THERE], pages / 2);
    EXPECT_BYTE(fates, pages / 2, UHMM_PAGE_PINNED);
    EXPECT_BYTE(fates + pages / 2, pages / 2, UHMM_PAGE_ALREADY_THERE);
    OK(uhmm_unpin(bench->session, memory, len / 2));
    OK(uhmm_migrate(bench->session, memory, len, bench->device, &report, NULL, 0));
    SAME(report.moved_pages, pages / 2);

    /* Some pages, then all. */
    OK(uhmm_evict(bench->session, bench->device, 16, &evicted));
    TRUE_THAT(evicted >= 16);
    OK(uhmm_evict(bench->session, bench->device, 0, NULL));
    EXPECT_RESIDENCY(bench->session, memory, len, UHMM_RESIDENCY_SYSTEM);
    OK(uhmm_evict(bench->session, bench->device, 0, &evicted));
    SAME(evicted, 0);
    EXPECT(memory, len, 50);
    FAILS(uhmm_evict(bench->session, NULL, 0, &evicted), EINVAL);
    FAILS(uhmm_pin(bench->session, memory, 1), EINVAL);
    FAILS(uhmm_unpin(bench->session, NULL, PAGE), EINVAL);
    OK(uhmm_release(bench->session, memory, len));
    OK(munmap(memory, len));
}

void hot_ranges(const struct bench *bench)
{
    enum { ROOM = 64 };
    const uint64_t len = 4 * MIB, range = 2 * MIB;
    uint8_t *memory = anonymous(len);
    uint64_t buffer[UHMM_PAGE_BYTES / 8], wanted = (uint64_t)(uintptr_t)memory / range * range;
    uhmm_hot_range found[ROOM + 1];
    size_t count = 0, at = 0;

    fill(memory, len, 46);
    OK(uhmm_adopt(bench->session, memory, len));
    OK(uhmm_device_read(bench->device, memory, buffer, PAGE, NULL));
    EXPECT(buffer, PAGE, 46);
    memset(found, 0xee, sizeof found);
    OK(uhmm_hot_ranges(bench->session, bench->device, found, ROOM, &count));
    TRUE_THAT(count >= 1 && count <= ROOM);
    while (at < count && found[at].addr != wanted)
        at++;
    TRUE_THAT(at < count && found[at].heat_permille >= 1 && found[at].heat_permille <= 1000);
    for (size_t i = 1; i < count; i++)
        TRUE_THAT(found[i - 1].heat_permille >= found[i].heat_permille);
    SAME(found[ROOM].heat_permille, 0xeeee);
    OK(uhmm_hot_ranges(bench->session, bench->device, NULL, 0, &count));

    FAILS(uhmm_hot_ranges(bench->session, bench->device, found, ROOM, NULL), EINVAL);
    FAILS(uhmm_hot_ranges(bench->session, NULL, found, ROOM, &count), EINVAL);
    FAILS(uhmm_hot_ranges(bench->session, bench->device, NULL, ROOM, &count), EINVAL);
    OK(uhmm_release(bench->session, memory, len));
    OK(munmap(memory, len));
}

void snapshots(const struct bench *bench)
{
    enum { PAGES = 6 };
    uint8_t *memory = anonymous(PAGES * PAGE), bytes[PAGES + 1];
    volatile uint8_t *touched = memory;
    const uint8_t expected[PAGES] = {
        UHMM_SNAPSHOT_ERROR,
        UHMM_SNAPSHOT_ERROR,
        UHMM_SNAPSHOT_ZERO | UHMM_SNAPSHOT_READ,
        UHMM_SNAPSHOT_READ,
        UHMM_SNAPSHOT_WRITE,
        UHMM_SNAPSHOT_PRIVATE_LOCAL | UHMM_SNAPSHOT_WRITE,
    };

    /* 0 not readable, 1 a hole, 2 the zero page, 3 read-only, 4 writable, 5 on the device. */
    OK(mprotect(memory, PAGE, PROT_NONE));
    OK(munmap(memory + PAGE, PAGE));
    OK(mprotect(memory + 2 * PAGE, PAGE, PROT_READ));
    SAME(touched[2 * PAGE], 0);
    fill(memory + 3 * PAGE, 3 * PAGE, 45);
    OK(mprotect(memory + 3 * PAGE, PAGE, PROT_READ));
    OK(uhmm_adopt(bench->session, memory + 5 * PAGE, PAGE));
    OK(uhmm_migrate(bench->session, memory + 5 * PAGE, PAGE, bench->device, NULL, NULL, 0));
    memset(bytes, 0xee, sizeof bytes);
    OK(uhmm_snapshot(bench->session, bench->device, memory, PAGES * PAGE, bytes, PAGES));
    for (int i = 0; i < PAGES; i++)
        SAME(bytes[i], expected[i]);
    SAME(bytes[PAGES], 0xee);
    /* Looking moved nothing. */
    EXPECT_RESIDENCY(bench->session, memory + 5 * PAGE, PAGE, UHMM_RESIDENCY_DEVICE);
    EXPECT(memory + 3 * PAGE, 3 * PAGE, 45);
    OK(uhmm_snapshot(bench->session, bench->device, memory + 5 * PAGE, PAGE, bytes, 1));
    SAME(bytes[0], UHMM_SNAPSHOT_WRITE);
    SAME(UHMM_SNAPSHOT_PRIVATE_REMOTE & ~UHMM_SNAPSHOT_WHERE, 0);

    FAILS(uhmm_snapshot(bench->session, bench->device, memory, PAGES * PAGE, bytes, PAGES - 1), EINVAL);
    FAILS(uhmm_snapshot(bench->session, bench->device, memory, PAGES * PAGE, NULL, PAGES), EINVAL);
    FAILS(uhmm_snapshot(bench->session, NULL, memory, PAGES * PAGE, bytes, PAGES), EINVAL);
    FAILS(uhmm_snapshot(bench->session, bench->device, memory, 10, bytes, PAGES), EINVAL);
    OK(uhmm_release(bench->session, memory + 5 * PAGE, PAGE));
    OK(munmap(memory, PAGES * PAGE));
}

void counters_and_trace(const struct bench *bench)
{
    const uint64_t len = 32 * PAGE;
    uhmm_metric metrics[256];
    uhmm_trace_record records[64];
    uint64_t before = 0, after = 0, last = 0, moved = 0;
    size_t count = 0, fewer = 0;
    uint8_t *memory = NULL;
    bool started = false;

    OK(uhmm_stats(bench->session, "pager", metrics, 256, &count));
    TRUE_THAT(count > 10 && count <= 256);
    for (size_t i = 0; i < count; i++)
        TRUE_THAT(strlen(metrics[i].name) > 0);
    metrics[1].value = 12345;
    OK(uhmm_stats(bench->session, "pager", metrics, 1, &fewer));
    SAME(fewer, count);
    SAME(metrics[1].value, 12345);
    OK(uhmm_stats(bench->session, "mirror", NULL, 0, &count));
    OK(uhmm_stats(bench->session, "supervisor", NULL, 0, &count));
    OK(uhmm_stats(bench->session, "soft0", NULL, 0, &count));
    FAILS(uhmm_stats(bench->session, "nobody", NULL, 0, &count), ENOENT);
    FAILS(uhmm_stats(bench->session, "pager", NULL, 0, NULL), EINVAL);
    FAILS(uhmm_stat(bench->session, "pager", "no_such_counter", &before), ENOENT);
    FAILS(uhmm_stat(bench->session, "pager", NULL, &before), EINVAL);

    /* What happened so far is read first: the trace below begins after it. */
    do {
        OK(uhmm_read_trace(bench->session, last + 1, records, 64, &count));
        for (size_t i = 0; i < count; i++) {
            TRUE_THAT(records[i].sequence > last);
            last = records[i].sequence;
        }
    } while (count > 0);
    OK(uhmm_allocate(bench->session, len, (void **)&memory));
    fill(memory, len, 55);
    OK(uhmm_stat(bench->session, "pager", "pages_out", &before));
    OK(uhmm_migrate(bench->session, memory, len, bench->device, NULL, NULL, 0));
    OK(uhmm_stat(bench->session, "pager", "pages_out", &after));
    SAME(after - before, len / PAGE);
    OK(uhmm_read_trace(bench->session, last + 1, records, 64, &count));
    for (size_t i = 0; i < count; i++) {
        const uhmm_trace_record *record = &records[i];
        TRUE_THAT(record->sequence > last && record->time_ns > 0);
        last = record->sequence;
        if (record->addr < (uintptr_t)memory || record->addr >= (uintptr_t)memory + len)
            continue;
        if (record->kind == UHMM_TRACE_MIGRATE_START || record->kind == UHMM_TRACE_MIGRATE_END) {
            SAME(record->cause, UHMM_CAUSE_PREFETCH);
            SAME(record->from, UHMM_PLACE_HOME);
            SAME(record->to, 0);
            if (record->kind == UHMM_TRACE_MIGRATE_START)
                started = true;
            else
                moved += record->page_count;
        }
    }
    TRUE_THAT(started);
    SAME(moved, len / PAGE);
    EXPECT(memory, len, 55);
    FAILS(uhmm_read_trace(bench->session, 0, records, 64, NULL), EINVAL);
    FAILS(uhmm_read_trace(bench->session, 0, NULL, 64, &count), EINVAL);
    OK(uhmm_free(bench->session, memory));
}
