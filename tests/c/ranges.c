/* Memory, migration, and what devices do with ranges. */
#define _GNU_SOURCE
#include "check.h"

#include <fcntl.h>
#include <unistd.h>

void shared_memory(const struct bench *bench)
{
    const uint64_t len = 4 * MIB, pages = len / PAGE;
    uint64_t *memory = NULL;
    uhmm_region_info info;
    uhmm_migrate_report report;
    uint8_t *fates = malloc(pages);

    TRUE_THAT(fates != NULL);
    FAILS(uhmm_allocate(bench->session, 5000, (void **)&memory), EINVAL);
    FAILS(uhmm_allocate(bench->session, 0, (void **)&memory), EINVAL);
    FAILS(uhmm_allocate(bench->session, len, NULL), EINVAL);
    FAILS(uhmm_allocate(bench->session, (uint64_t)1 << 50, (void **)&memory), ENOMEM);
    TRUE_THAT(memory == NULL);
    OK(uhmm_allocate(bench->session, len, (void **)&memory));
    EXPECT_BYTE(memory, PAGE, 0);
    fill(memory, len, 1);
    OK(uhmm_region(bench->session, memory, &info));
    SAME(info.len_bytes, len);
    SAME(info.populated_bytes, len);
    TRUE_THAT(info.region > 0);
    FAILS(uhmm_region(bench->session, memory + 512, &info), ENOENT);

    memset(fates, 0xee, pages);
    OK(uhmm_migrate(bench->session, memory, len, bench->device, &report, fates, pages));
    SAME(report.moved_pages, pages);
    SAME(report.pages[UHMM_PAGE_MOVED], pages);
    EXPECT_BYTE(fates, pages, UHMM_PAGE_MOVED);
    EXPECT_RESIDENCY(bench->session, memory, len, UHMM_RESIDENCY_DEVICE);
    OK(uhmm_region(bench->session, memory, &info));
    SAME(info.populated_bytes, 0);
    /* Again: all there. One page fewer than room: refused before anything is done. */
    OK(uhmm_migrate(bench->session, memory, len, bench->device, &report, NULL, 0));
    SAME(report.pages[UHMM_PAGE_ALREADY_THERE], pages);
    SAME(report.moved_pages, 0);
    FAILS(uhmm_migrate(bench->session, memory, len, NULL, &report, fates, pages - 1), EINVAL);
    EXPECT_RESIDENCY(bench->session, memory, len, UHMM_RESIDENCY_DEVICE);

    EXPECT(memory, len, 1);
    fill(memory, len, 2);
    OK(uhmm_prefetch(bench->session, memory, len, bench->device, &report));
    OK(uhmm_migrate(bench->session, memory, len, NULL, &report, fates, pages));
    SAME(report.moved_pages, pages);
    EXPECT_RESIDENCY(bench->session, memory, len, UHMM_RESIDENCY_SYSTEM);
    EXPECT(memory, len, 2);

    OK(uhmm_migrate(bench->session, memory, len / 2, bench->device, NULL, NULL, 0));
    OK(uhmm_discard(bench->session, memory, len));
    EXPECT_BYTE(memory, len, 0);

    FAILS(uhmm_migrate(bench->session, memory, 100, bench->device, NULL, NULL, 0), EINVAL);
    FAILS(uhmm_migrate(bench->session, (char *)memory + 1, PAGE, bench->device, NULL, NULL, 0), EINVAL);
    FAILS(uhmm_migrate(bench->session, memory, 0, bench->device, NULL, NULL, 0), EINVAL);
    FAILS(uhmm_migrate(bench->session, NULL, PAGE, bench->device, NULL, NULL, 0), EINVAL);
    FAILS(uhmm_migrate(bench->session, memory, len, (uhmm_device *)bench->session, NULL, NULL, 0), EINVAL);
    FAILS(uhmm_migrate(bench->session, memory, len, bench->device, NULL, NULL, 1), EINVAL);
    OK(uhmm_free(bench->session, memory));
    FAILS(uhmm_free(bench->session, memory), ENOENT);
    FAILS(uhmm_region(bench->session, memory, &info), ENOENT);
    free(fates);
}

void private_memory(const struct bench *bench)
{
    const uint64_t len = 4 * MIB, pages = len / PAGE;
    uint8_t *memory = anonymous(len);
    uhmm_migrate_report report;
    uhmm_access_report access;

    fill(memory, len, 3);
    FAILS(uhmm_adopt(bench->session, memory, 100), EINVAL);
    FAILS(uhmm_adopt(bench->session, NULL, PAGE), EINVAL);
    FAILS(uhmm_migrate(bench->session, memory, len, bench->device, &report, NULL, 0), EFAULT);
    OK(uhmm_adopt(bench->session, memory, len));
    OK(uhmm_adopt(bench->session, memory, len));
    EXPECT(memory, len, 3);
    OK(uhmm_migrate(bench->session, memory, len, bench->device, &report, NULL, 0));
    SAME(report.moved_pages, pages);
    EXPECT_RESIDENCY(bench->session, memory, len, UHMM_RESIDENCY_DEVICE);
    EXPECT(memory, len, 3);
    fill(memory, len, 4);
    /* The device faults it in: all with one range fault. */
    OK(uhmm_fault_and_migrate(bench->device, memory, len, &access));
    SAME(access.page_count, pages);
    SAME(access.fault_count, 1);
    EXPECT_RESIDENCY(bench->session, memory, len, UHMM_RESIDENCY_DEVICE);
    OK(uhmm_fault_and_migrate(bench->device, memory, len, &access));
    SAME(access.fault_count, 0);
    FAILS(uhmm_fault_and_migrate(bench->device, memory, 0, &access), EINVAL);
    /* A part is given back while it is on the device; the rest stays under management. */
    OK(uhmm_release(bench->session, memory, len / 2));
    EXPECT(memory, len, 4);
    OK(uhmm_migrate(bench->session, memory + len / 2, len / 2, bench->device, &report, NULL, 0));
    SAME(report.moved_pages, pages / 2);
    FAILS(uhmm_migrate(bench->session, memory, len / 2, bench->device, &report, NULL, 0), EFAULT);
    OK(uhmm_release(bench->session, memory, len / 2));
    OK(uhmm_discard(bench->session, memory + len / 2, MIB));
    EXPECT(memory, len / 2, 4);
    EXPECT_BYTE(memory + len / 2, MIB, 0);
    for (uint64_t i = (len / 2 + MIB) / 8; i < len / 8; i++)
        SAME(((uint64_t *)memory)[i], word(4, i));
    OK(uhmm_release(bench->session, memory + len / 2, len / 2));
    FAILS(uhmm_release(bench->session, memory, 0), EINVAL);
    OK(munmap(memory, len));
    FAILS(uhmm_adopt(bench->session, memory, len), EFAULT);

    /* A shared file mapping: used by the device in place, and the file gets the bytes. */
    char path[] = "/tmp/uhmm-c-XXXXXX";
    int file = mkstemp(path);
    uint8_t buffer[2 * UHMM_PAGE_BYTES] __attribute__((aligned(8)));
    TRUE_THAT(file >= 0);
    OK(ftruncate(file, sizeof buffer));
    memory = mmap(NULL, sizeof buffer, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    TRUE_THAT(memory != MAP_FAILED);
    fill(memory, sizeof buffer, 5);
    OK(uhmm_adopt(bench->session, memory, sizeof buffer));
    OK(uhmm_device_read(bench->device, memory, buffer, sizeof buffer, NULL));
    EXPECT(buffer, sizeof buffer, 5);
    fill(buffer, sizeof buffer, 6);
    OK(uhmm_device_write(bench->device, memory, buffer, sizeof buffer, NULL));
    EXPECT(memory, sizeof buffer, 6);
    memset(buffer, 0, sizeof buffer);
    SAME(pread(file, buffer, sizeof buffer, 0), sizeof buffer);
    EXPECT(buffer, sizeof buffer, 6);
    OK(uhmm_release(bench->session, memory, sizeof buffer));
    OK(munmap(memory, sizeof buffer));
    OK(close(file));
    OK(unlink(path));
}

void device_accesses(const struct bench *bench)
{
    /* Several pieces, the last one a short one. */
    const uint64_t len = 5 * MIB + 5 * PAGE, pages = len / PAGE, words = len / 8;
    uint64_t *memory = anonymous(len), *buffer = malloc(len);
    uhmm_access_report report;

    TRUE_THAT(buffer != NULL);
    fill(memory, len, 7);
    OK(uhmm_adopt(bench->session, memory, len));
    OK(uhmm_device_read(bench->device, memory, buffer, len, &report));
    SAME(report.page_count, pages);
    SAME(report.fault_count, 1);
    EXPECT(buffer, len, 7);
    OK(uhmm_device_read(bench->device, memory, buffer, len, &report));
    SAME(report.fault_count, 0);

    fill(buffer, len, 8);
    OK(uhmm_device_write(bench->device, memory, buffer, len, &report));
    SAME(report.page_count, pages);
    EXPECT(memory, len, 8);

    memset(buffer, 0, len);
    OK(uhmm_device_fetch_add(bench->device, memory, len, 1000, buffer, &report));
    SAME(report.page_count, pages);
    EXPECT(buffer, len, 8);
    for (uint64_t i = 0; i < words; i++)
        SAME(memory[i], word(8, i) + 1000);
    OK(uhmm_device_fetch_add(bench->device, memory, len, (uint64_t)-1000, NULL, NULL));
    EXPECT(memory, len, 8);

    OK(uhmm_device_exclusive(bench->device, memory, len, &report));
    SAME(report.page_count, pages);
    EXPECT_RESIDENCY(bench->session, memory, len, UHMM_RESIDENCY_EXCLUSIVE);
    FAILS(uhmm_check_exclusive(bench->session, memory, len), EPERM);
    for (uint64_t i = 0; i < words; i++) {
        SAME(memory[i], word(8, i));
        memory[i] += 1;
    }
    OK(uhmm_check_exclusive(bench->session, memory, len));
    OK(uhmm_device_read(bench->device, memory, buffer, len, NULL));
    for (uint64_t i = 0; i < words; i++)
        SAME(buffer[i], word(8, i) + 1);

    FAILS(uhmm_device_read(bench->device, memory, NULL, PAGE, NULL), EINVAL);
    FAILS(uhmm_device_read(bench->device, NULL, buffer, PAGE, NULL), EINVAL);
    FAILS(uhmm_device_read(bench->device, memory, buffer, 100, NULL), EINVAL);
    FAILS(uhmm_device_read(bench->device, memory, buffer, 0, NULL), EINVAL);
    FAILS(uhmm_device_read(bench->device, memory, buffer, UINT64_MAX, NULL), EINVAL);
    FAILS(uhmm_device_read(bench->device, (char *)memory + 8, buffer, PAGE, NULL), EINVAL);
    FAILS(uhmm_device_write(bench->device, memory, NULL, PAGE, NULL), EINVAL);
    FAILS(uhmm_device_fetch_add(bench->device, memory, len, 1, (uint64_t *)((char *)buffer + 1), NULL), EINVAL);
    FAILS(uhmm_device_exclusive(bench->device, memory, 0, NULL), EINVAL);
    FAILS(uhmm_check_exclusive(bench->session, memory, 1), EINVAL);
    OK(uhmm_release(bench->session, memory, len));
    for (uint64_t i = 0; i < words; i++)
        SAME(memory[i], word(8, i) + 1);
    OK(munmap(memory, len));
    free(buffer);
}

void protections(const struct bench *bench)
{
    const uint64_t len = 8 * PAGE;
    uint64_t *memory = anonymous(len), buffer[UHMM_PAGE_BYTES / 8];

    fill(memory, len, 9);
    OK(uhmm_adopt(bench->session, memory, len));
    OK(uhmm_protect(bench->session, memory, len, 0));
    memset(buffer, 0x5a, sizeof buffer);
    FAILS(uhmm_device_read(bench->device, memory, buffer, PAGE, NULL), EFAULT);
    EXPECT_BYTE(buffer, sizeof buffer, 0x5a);
    OK(uhmm_protect(bench->session, memory, len, UHMM_PROTECT_READ));
    OK(uhmm_device_read(bench->device, memory, buffer, PAGE, NULL));
    EXPECT(buffer, PAGE, 9);
    FAILS(uhmm_device_write(bench->device, memory, buffer, PAGE, NULL), EPERM);
    EXPECT(memory, len, 9);
    OK(uhmm_protect(bench->session, memory, len, UHMM_PROTECT_READ | UHMM_PROTECT_WRITE));
    fill(buffer, PAGE, 10);
    OK(uhmm_device_write(bench->device, memory, buffer, PAGE, NULL));
    EXPECT(memory, PAGE, 10);
    /* Nothing is written when a part may not be, although the device maps all that lies before it. */
    const uint64_t long_len = 3 * MIB;
    uint64_t *long_memory = anonymous(long_len), *bytes = malloc(long_len);
    TRUE_THAT(bytes != NULL);
    OK(uhmm_adopt(bench->session, long_memory, long_len));
    fill(bytes, long_len, 11);
    OK(uhmm_device_write(bench->device, long_memory, bytes, long_len, NULL));
    OK(uhmm_protect(bench->session, (char *)long_memory + long_len - PAGE, PAGE, UHMM_PROTECT_READ));
    fill(bytes, long_len, 12);
    FAILS(uhmm_device_write(bench->device, long_memory, bytes, long_len, NULL), EPERM);
    FAILS(uhmm_device_fetch_add(bench->device, long_memory, long_len, 1, NULL, NULL), EPERM);
    EXPECT(long_memory, long_len, 11);
    OK(uhmm_release(bench->session, long_memory, long_len));
    OK(munmap(long_memory, long_len));
    free(bytes);
    FAILS(uhmm_protect(bench->session, memory, len, UHMM_PROTECT_WRITE), EINVAL);
    FAILS(uhmm_protect(bench->session, memory, len, 4), EINVAL);
    FAILS(uhmm_protect(bench->session, memory, 1, UHMM_PROTECT_READ), EINVAL);
    OK(uhmm_release(bench->session, memory, len));
    OK(munmap(memory, len));
}
