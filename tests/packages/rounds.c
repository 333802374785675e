/* A program that uses uhmm for as long as it is let, round after round: rounds RUN_DIR DEVICE STOP_FILE. Says each round that was right.
 * With a fourth word it leaves its memory on the device until the file is there, and then says whether all of it is right. */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include <uhmm.h>

enum { BYTES = 4 << 20, WORDS = BYTES / 8 };

static void check(const char *what, int rc)
{
    char text[512];
    if (rc >= 0)
        return;
    uhmm_last_error(text, sizeof text);
    printf("%s: %d: %s\n", what, rc, text);
    exit(1);
}

int main(int argc, char **argv)
{
    uhmm_session *session;
    uhmm_device *device;
    uint64_t *words;

    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc != 4 && argc != 5)
        return 2;
    check("connect", uhmm_connect(argv[1], &session));
    check("device", uhmm_device_open(session, argv[2], &device));
    check("allocate", uhmm_allocate(session, BYTES, (void **)&words));
    if (argc == 5) {
        for (uint64_t i = 0; i < WORDS; i++)
            words[i] = i * 3;
        check("migrate", uhmm_migrate(session, words, BYTES, device, NULL, NULL, 0));
        printf("held\n");
        while (access(argv[3], F_OK) != 0)
            usleep(20000);
        for (uint64_t i = 0; i < WORDS; i++)
            if (words[i] != i * 3)
                return 1;
        printf("right\n");
        return 0;
    }
    for (uint64_t round = 1; access(argv[3], F_OK) != 0; round++) {
        for (uint64_t i = 0; i < WORDS; i++)
            words[i] = round << 32 | i;
        /* A service that ends in the middle of it may fail a migration, and never a byte. */
        int rc = uhmm_migrate(session, words, BYTES, device, NULL, NULL, 0);
        for (uint64_t i = 0; i < WORDS; i++)
            if (words[i] != (round << 32 | i)) {
                printf("word %llu of round %llu is %#llx\n", (unsigned long long)i, (unsigned long long)round, (unsigned long long)words[i]);
                return 1;
            }
        printf("round %llu %s\n", (unsigned long long)round, rc == 0 ? "migrated" : "stayed");
    }
    check("free", uhmm_free(session, words));
    uhmm_disconnect(session);
    return 0;
}
