/* Reads the pages of an open sequence where they are: in the worker's own frames, mapped read-only,
 * under a lease.
 *
 *   owned_pages WORKER SOCKET MODEL SEQUENCE LAYERS PAGE_TOKENS K_ROW_BYTES V_ROW_BYTES
 *
 * WORKER: host:port. SOCKET: of its local plane. MODEL: its digest, 64 hex digits. What follows
 * SEQUENCE is what an engine knows of its model, which has one layer group here. Prints, for the K
 * and the V rows of each layer, a hash (FNV-1a) of the rows in the order of tokens. No row is
 * copied. */
#define _POSIX_C_SOURCE 200809L /* clock_gettime */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "clients/c/plane.h"
#include "clients/c/rpc.h"
#include "clients/c/wire.h"

enum { kMaxExtents = 4096, kLeaseSeconds = 10 };

/* Rows that stand one after another in one frame. */
struct Extent {
  uint64_t group, first_slot, count, pool_offset, first_row, pending_shift;
  bool has_offset;
};
struct Table {
  struct Extent extents[kMaxExtents];
  size_t num_extents;
  bool is_bad; /* more than fit, or no table */
};

static void ReadTable(void* context, const uint8_t* data, size_t size) {
  struct Table* const table = context;
  struct pt_reader reader = pt_read(data, size);
  struct pt_field field;
  while (pt_next(&reader, &field)) {
    if (field.number == 4 && field.size > 0) table->is_bad = true; /* the table goes on */
    if (field.number != 2 || field.data == NULL) continue;
    if (table->num_extents == kMaxExtents) {
      table->is_bad = true;
      return;
    }
    struct Extent* const extent = &table->extents[table->num_extents++];
    struct pt_reader inner = pt_read(field.data, field.size);
    struct pt_field part;
    while (pt_next(&inner, &part)) {
      if (part.number == 1) extent->group = part.value;
      if (part.number == 3) extent->first_slot = part.value;
      if (part.number == 4) extent->count = part.value;
      if (part.number == 11) extent->pool_offset = part.value;
      if (part.number == 11) extent->has_offset = true;
      if (part.number == 12) extent->first_row = part.value;
      if (part.number == 13) extent->pending_shift = part.value;
    }
    table->is_bad = table->is_bad || inner.is_bad;
  }
  table->is_bad = table->is_bad || reader.is_bad;
}

static uint64_t Hash(uint64_t state, const uint8_t* bytes, uint64_t size) {
  for (uint64_t i = 0; i < size; ++i) state = (state ^ bytes[i]) * 0x100000001b3u;
  return state;
}

static double Now(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Checks that every row of the table is one that can be read in place, within the pool. */
static bool CheckTable(const struct Table* table, uint64_t pool_bytes, uint64_t page_tokens,
                       uint64_t page_bytes) {
  uint64_t rows = 0;
  for (size_t i = 0; i < table->num_extents; ++i) {
    const struct Extent* const extent = &table->extents[i];
    if (extent->group != 0 || extent->pending_shift != 0 || !extent->has_offset ||
        extent->first_row != rows || extent->first_slot > page_tokens ||
        extent->count > page_tokens - extent->first_slot || extent->pool_offset > pool_bytes ||
        page_bytes > pool_bytes - extent->pool_offset) {
      return false;
    }
    rows += extent->count;
  }
  return !table->is_bad;
}

static int Read(struct pt_worker* worker, const struct pt_plane* plane, char** arguments) {
  const uint64_t layers = strtoull(arguments[5], NULL, 10),
                 page_tokens = strtoull(arguments[6], NULL, 10);
  const uint64_t row_bytes[2] = {strtoull(arguments[7], NULL, 10),
                                 strtoull(arguments[8], NULL, 10)};
  const uint64_t layer_bytes = page_tokens * (row_bytes[0] + row_bytes[1]);
  char error[512];

  /* Under a lease all pages are in frames, and stay there. The worker compares the plane's id: an
   * offset into another worker's pool would be of no use. */
  struct pt_message request = {0}, lease = {0};
  pt_put_uint(&lease, 1, kLeaseSeconds);
  pt_put_string(&request, 1, arguments[4]);
  pt_put_message(&request, 2, &lease);
  pt_put_uint(&request, 6, plane->client_id);
  static struct Table table;
  const double valid_until = Now() + kLeaseSeconds; /* from before the worker's clock starts */
  const bool is_leased = pt_call(worker, "/pagetide.v1.SequenceService/GetBlockTable", &request,
                                 kLeaseSeconds, ReadTable, &table, error, sizeof(error));
  pt_free(&lease);
  pt_free(&request);
  if (!is_leased) {
    fprintf(stderr, "%s\n", error);
    return 1;
  }
  if (!CheckTable(&table, plane->pool_bytes, page_tokens, layers * layer_bytes)) {
    fprintf(stderr, "the table has rows that cannot be read in place\n");
    return 1;
  }
  /* A page: [layer][K: page_tokens rows][V: page_tokens rows]. */
  uint64_t hashes[2 * 256];
  if (layers > 256) return 1;
  uint64_t num_rows = 0;
  for (uint64_t layer = 0; layer < layers; ++layer) {
    for (int kind = 0; kind < 2; ++kind) {
      uint64_t hash = 0xcbf29ce484222325u;
      num_rows = 0;
      for (size_t i = 0; i < table.num_extents; ++i) {
        const struct Extent* const extent = &table.extents[i];
        const uint8_t* const rows = plane->pool + extent->pool_offset + layer * layer_bytes +
                                    (kind == 0 ? 0 : page_tokens * row_bytes[0]) +
                                    extent->first_slot * row_bytes[kind];
        hash = Hash(hash, rows, extent->count * row_bytes[kind]);
        num_rows += extent->count;
      }
      hashes[2 * layer + (uint64_t)kind] = hash;
    }
  }
  /* Afterwards: behind its end a frame may have become another page's while it was read. */
  if (Now() >= valid_until) {
    fprintf(stderr, "the lease ended: what was read is worth nothing\n");
    return 1;
  }
  for (uint64_t layer = 0; layer < layers; ++layer) {
    for (int kind = 0; kind < 2; ++kind) {
      printf("layer %llu %c rows %llu hash %016llx\n", (unsigned long long)layer,
             kind == 0 ? 'K' : 'V', (unsigned long long)num_rows,
             (unsigned long long)hashes[2 * layer + (uint64_t)kind]);
    }
  }
  return 0;
}

int main(int count, char** arguments) {
  if (count != 9) {
    fprintf(stderr,
            "usage: %s WORKER SOCKET MODEL SEQUENCE LAYERS PAGE_TOKENS K_ROW_BYTES V_ROW_BYTES\n",
            arguments[0]);
    return 2;
  }
  char error[512];
  struct pt_plane plane;
  if (!pt_plane_connect(&plane, arguments[2], arguments[3], -1, 0, error, sizeof(error))) {
    fprintf(stderr, "%s\n", error);
    return 1;
  }
  int code = 1;
  if (plane.pool == NULL) {
    fprintf(stderr, "this worker's frames cannot be mapped: kind %d: %s\n", (int)plane.pool_kind,
            plane.why_no_pool);
  } else {
    struct pt_worker* const worker = pt_worker_connect(arguments[1]);
    if (worker != NULL) code = Read(worker, &plane, arguments);
    if (worker != NULL) pt_worker_close(worker);
  }
  pt_plane_close(&plane);
  return code;
}
