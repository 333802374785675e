/*
 * PageRank over a synthetic graph, for `uhmm-run-compare`: knows nothing of uhmm. Every node has 16 edges that come in, half of them from few hubs
 * and half from anywhere; they lie in one array (compressed sparse rows). Prints a hash of all ranks.
 *
 *   pagerank NODES ROUNDS
 */
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DEGREE = 16 };

static uint64_t mix(uint64_t value)
{
    value ^= value >> 31;
    value *= UINT64_C(0x7fb5d329728ea185);
    value ^= value >> 27;
    value *= UINT64_C(0x81dadef4bc2dd44d);
    return value ^ value >> 33;
}

static uint32_t source_of(uint64_t edge, uint32_t nodes)
{
    uint64_t random = mix(edge + 1);
    uint32_t among = edge % 2 == 0 ? nodes : nodes / 64 + 1;
    return (uint32_t)(random % among);
}

static void *need(size_t count, size_t bytes)
{
    void *got = calloc(count, bytes);
    if (got == NULL) {
        perror("pagerank");
        exit(1);
    }
    return got;
}

int main(int argc, char **argv)
{
    uint32_t nodes = argc > 2 ? (uint32_t)strtoul(argv[1], NULL, 10) : 0;
    int rounds = argc > 2 ? atoi(argv[2]) : 0;
    if (nodes < 2 || rounds < 1)
        return 2;
    uint32_t *edges = need((size_t)nodes * DEGREE, sizeof *edges);
    uint32_t *goes_out = need(nodes, sizeof *goes_out);
    double *rank = need(nodes, sizeof *rank), *share = need(nodes, sizeof *share);
    for (uint64_t edge = 0; edge < (uint64_t)nodes * DEGREE; edge++) {
        edges[edge] = source_of(edge, nodes);
        goes_out[edges[edge]]++;
    }
    for (uint32_t node = 0; node < nodes; node++)
        rank[node] = 1.0 / nodes;
    for (int round = 0; round < rounds; round++) {
        for (uint32_t node = 0; node < nodes; node++)
            share[node] = goes_out[node] > 0 ? rank[node] / goes_out[node] : 0;
        for (uint32_t node = 0; node < nodes; node++) {
            double sum = 0;
            for (int edge = 0; edge < DEGREE; edge++)
                sum += share[edges[(size_t)node * DEGREE + edge]];
            rank[node] = 0.15 / nodes + 0.85 * sum;
        }
    }
    uint64_t hash = 0;
    for (uint32_t node = 0; node < nodes; node++) {
        uint64_t bits;
        memcpy(&bits, &rank[node], sizeof bits);
        hash = mix(hash ^ bits);
    }
    printf("%016" PRIx64 "\n", hash);
    return 0;
}
