/*
 * A plugin that uses libuhmm is unloaded: `agent_dlopen RUN_DIR`. Not linked with it. Expected: memory that is on the device is
 * still served afterwards; libuhmm used to be unmapped under its threads.
 */
#define _GNU_SOURCE
#include <dlfcn.h>

#include "check.h"

#undef OK
#undef TRUE_THAT
#define TRUE_THAT(condition_)                                                     \
    do {                                                                          \
        if (!(condition_)) {                                                      \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition_); \
            _Exit(1);                                                             \
        }                                                                         \
    } while (0)
#define OK(call_) TRUE_THAT((call_) == 0)

/* The function of this name. */
#define FIND(library_, name_) ((__typeof__(&name_))dlsym(library_, #name_))

static void *map_filled(uint64_t len, uint64_t seed)
{
    void *memory = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TRUE_THAT(memory != MAP_FAILED);
    fill(memory, len, seed);
    return memory;
}

static bool is_right(const void *memory, uint64_t len, uint64_t seed)
{
    const volatile uint64_t *words = memory;
    for (uint64_t i = 0; i < len / 8; i++)
        if (words[i] != word(seed, i))
            return false;
    return true;
}

/* One life of the plugin; its memory is on the device when it has gone. */
static void *load_use_unload(const char *run_dir, uint64_t len, uint64_t seed)
{
    uhmm_session *session;
    uhmm_device *device;
    uhmm_migrate_report report;
    void *library = dlopen("libuhmm.so", RTLD_NOW | RTLD_LOCAL);
    if (library == NULL)
        fprintf(stderr, "%s\n", dlerror());
    TRUE_THAT(library != NULL);
    OK(FIND(library, uhmm_connect)(run_dir, &session));
    OK(FIND(library, uhmm_device_open)(session, "soft0", &device));
    void *memory = map_filled(len, seed);
    OK(FIND(library, uhmm_adopt)(session, memory, len));
    OK(FIND(library, uhmm_migrate)(session, memory, len, device, &report, NULL, 0));
    TRUE_THAT(report.moved_pages == len / PAGE);
    OK(dlclose(library));
    return memory;
}

int main(int argc, char **argv)
{
    void *memory[4];
    TRUE_THAT(argc == 2);
    /* Else nothing would be unloaded. */
    TRUE_THAT(dlopen("libuhmm.so", RTLD_NOW | RTLD_NOLOAD) == NULL);
    for (uint64_t i = 0; i < 4; i++) {
        memory[i] = load_use_unload(argv[1], MIB, i);
        /* What the plugin before has left is half home by now. */
        TRUE_THAT(i == 0 || is_right(memory[i - 1], MIB / 2, i - 1));
    }
    for (uint64_t i = 0; i < 4; i++) {
        TRUE_THAT(is_right(memory[i], MIB, i));
        OK(munmap(memory[i], MIB));
    }
    printf("ok dlopen\n");
    return 0;
}
