/* An engine with a KV pool of its own: loads what PageTide knows of a prompt into its blocks,
 * computes the rest, stores the full pages, and loads them again elsewhere to compare.
 *
 *   engine_pool WORKER SOCKET MODEL LAYERS HEADS HEAD_BYTES TYPE TOKENS
 *
 * WORKER: host:port. SOCKET: of its local plane. MODEL: its digest, 64 hex digits. K and V have
 * HEADS heads of HEAD_BYTES, of the data type TYPE (a number of pagetide.v1.DataType). TOKENS: the
 * prompt, comma-separated. The "model" is a formula, Row, so that every byte can be checked; the
 * loop around it is an engine's. What it registers is its own memory, which it takes back before it
 * ends. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "clients/c/plane.h"
#include "clients/c/rpc.h"
#include "clients/c/wire.h"

enum { kBlockTokens = 8, kMaxTokens = 4096, kCallSeconds = 30 };

struct Engine {
  struct pt_worker* worker;
  uint8_t* memory;
  uint64_t layers, heads, head_bytes;
  uint32_t num_blocks; /* with block 0, the null block, which is never written */
  char name[64];
  uint64_t generation; /* of its registration */
  uint32_t tokens[kMaxTokens];
  size_t num_tokens;
};

static uint64_t RowBytes(const struct Engine* engine) {
  return engine->heads * engine->head_bytes;
}

/* Where the K (kind 0) or V rows of a layer lie: [block][token][head][byte], dense. */
static uint64_t PlaneOffset(const struct Engine* engine, uint64_t layer, int kind) {
  return (2 * layer + (uint64_t)kind) * engine->num_blocks * kBlockTokens * RowBytes(engine);
}
static uint8_t* RowAt(const struct Engine* engine, uint64_t layer, int kind, const uint32_t* blocks,
                      size_t token) {
  const uint64_t slot =
      (uint64_t)blocks[token / kBlockTokens] * kBlockTokens + token % kBlockTokens;
  return engine->memory + PlaneOffset(engine, layer, kind) + slot * RowBytes(engine);
}

/* What the "model" computes. */
static uint8_t Row(const struct Engine* engine, uint64_t layer, int kind, size_t token,
                   uint64_t byte) {
  return (uint8_t)(engine->tokens[token] * 31 + token * 7 + layer * 101 + (uint64_t)kind * 37 +
                   byte);
}

/* --- messages of proto/pagetide/v1/engine_pool.proto --- */

static void PutRef(struct pt_message* to, uint32_t field, const struct Engine* engine) {
  struct pt_message ref = {0};
  pt_put_string(&ref, 1, engine->name);
  pt_put_uint(&ref, 2, engine->generation);
  pt_put_message(to, field, &ref);
  pt_free(&ref);
}

static void ReadGeneration(void* context, const uint8_t* data, size_t size) {
  struct Engine* const engine = context;
  struct pt_reader reader = pt_read(data, size);
  struct pt_field field;
  while (pt_next(&reader, &field)) {
    if (field.number != 1 || field.data == NULL) continue; /* the pool */
    struct pt_reader ref = pt_read(field.data, field.size);
    struct pt_field part;
    while (pt_next(&ref, &part)) {
      if (part.number == 2) engine->generation = part.value;
    }
  }
}

struct Job {
  char id[128];
  uint64_t state, usable_tokens, moved_pages, known_pages;
  char message[256];
};
enum { kDone = 3 };

static void ReadJob(void* context, const uint8_t* data, size_t size) {
  struct Job* const job = context;
  struct pt_reader reader = pt_read(data, size);
  struct pt_field field;
  while (pt_next(&reader, &field)) {
    if (field.number != 1 || field.data == NULL) continue; /* the job */
    *job = (struct Job){.state = 0};
    struct pt_reader inner = pt_read(field.data, field.size);
    struct pt_field part;
    while (pt_next(&inner, &part)) {
      if (part.number == 1) pt_text(&part, job->id, sizeof(job->id));
      if (part.number == 3) job->state = part.value;
      if (part.number == 6) job->usable_tokens = part.value;
      if (part.number == 7) job->moved_pages = part.value;
      if (part.number == 9) job->known_pages = part.value;
      if (part.number == 13) pt_text(&part, job->message, sizeof(job->message));
    }
  }
}

static void Ignore(void* context, const uint8_t* data, size_t size) {
  (void)context, (void)data, (void)size;
}

static bool Call(const struct Engine* engine, const char* method, struct pt_message* request,
                 pt_on_message on_message, void* context) {
  char error[512];
  const bool is_done = pt_call(engine->worker, method, request, kCallSeconds, on_message, context,
                               error, sizeof(error));
  pt_free(request);
  if (!is_done) fprintf(stderr, "%s\n", error);
  return is_done;
}

/* --- what an engine does --- */

static bool Register(struct Engine* engine, uint64_t client_id, const char* model, uint64_t type) {
  struct pt_message group = {0}, request = {0};
  pt_put_uint(&group, 1, 1); /* LAYOUT_NHD */
  pt_put_uint(&group, 2, type);
  pt_put_uint(&group, 3, type);
  pt_put_uint(&group, 4, engine->heads);
  for (uint64_t layer = 0; layer < engine->layers; ++layer) {
    struct pt_message planes = {0};
    for (int kind = 0; kind < 2; ++kind) {
      struct pt_message plane = {0}; /* strides left out: dense */
      pt_put_uint(&plane, 2, PlaneOffset(engine, layer, kind));
      pt_put_message(&planes, kind == 0 ? 1 : 2, &plane);
      pt_free(&plane);
    }
    pt_put_message(&group, 5, &planes);
    pt_free(&planes);
  }
  pt_put_string(&request, 2, engine->name);
  pt_put_string(&request, 3, model);
  pt_put_uint(&request, 4, client_id);
  pt_put_uint(&request, 5, kBlockTokens);
  pt_put_uint(&request, 6, engine->num_blocks);
  pt_put_message(&request, 7, &group);
  pt_free(&group);
  return Call(engine, "/pagetide.v1.EnginePoolService/RegisterEnginePool", &request, ReadGeneration,
              engine);
}

/* Begins a load or a store of the prompt and waits for its end. Whatever goes wrong, no job works
 * on the blocks when this returns. */
static bool RunJob(const struct Engine* engine, bool is_load, const uint32_t* blocks,
                   struct Job* job) {
  struct pt_message map = {0}, request = {0};
  pt_put_uints(&map, 2, blocks, (engine->num_tokens + kBlockTokens - 1) / kBlockTokens);
  PutRef(&request, 2, engine);
  pt_put_uints(&request, 3, engine->tokens, engine->num_tokens);
  pt_put_message(&request, is_load ? 7 : 5, &map);
  if (is_load) pt_put_uint(&request, 8, 1); /* this engine needs no logits: even the last token */
  pt_free(&map);
  *job = (struct Job){.state = 0};
  if (!Call(engine,
            is_load ? "/pagetide.v1.EnginePoolService/LoadPages"
                    : "/pagetide.v1.EnginePoolService/StorePages",
            &request, ReadJob, job)) {
    return false;
  }
  struct pt_message watch = {0};
  pt_put_string(&watch, 1, job->id);
  if (!Call(engine, "/pagetide.v1.EnginePoolService/WatchJob", &watch, ReadJob, job)) {
    struct pt_message cancel = {0};
    pt_put_string(&cancel, 1, job->id);
    pt_put_uint(&cancel, 2, 1); /* wait */
    if (!Call(engine, "/pagetide.v1.EnginePoolService/CancelJob", &cancel, ReadJob, job))
      return false;
  }
  if (job->state != kDone)
    fprintf(stderr, "the job ended early, its numbers hold: %s\n", job->message);
  return true;
}

static uint64_t Hash(uint64_t state, const uint8_t* bytes, uint64_t size) {
  for (uint64_t i = 0; i < size; ++i) state = (state ^ bytes[i]) * 0x100000001b3u;
  return state;
}

static int Serve(struct Engine* engine) {
  const uint32_t num_blocks = (uint32_t)((engine->num_tokens + kBlockTokens - 1) / kBlockTokens);
  uint32_t blocks[kMaxTokens / kBlockTokens], others[kMaxTokens / kBlockTokens];
  for (uint32_t b = 0; b < num_blocks; ++b) {
    blocks[b] = num_blocks - b; /* any order does */
    others[b] = num_blocks + 1 + b;
  }
  struct Job job;
  if (!RunJob(engine, true, blocks, &job)) return 1;
  const size_t loaded = (size_t)job.usable_tokens;
  uint64_t hash = 0xcbf29ce484222325u;
  for (uint64_t layer = 0; layer < engine->layers; ++layer) {
    for (int kind = 0; kind < 2; ++kind) {
      for (size_t token = 0; token < loaded; ++token) {
        hash = Hash(hash, RowAt(engine, layer, kind, blocks, token), RowBytes(engine));
      }
      for (size_t token = loaded; token < engine->num_tokens; ++token) {
        uint8_t* const row = RowAt(engine, layer, kind, blocks, token);
        for (uint64_t i = 0; i < RowBytes(engine); ++i) row[i] = Row(engine, layer, kind, token, i);
      }
    }
  }
  printf("loaded %zu of %zu tokens, hash %016llx\n", loaded, engine->num_tokens,
         (unsigned long long)hash);

  if (!RunJob(engine, false, blocks, &job)) return 1;
  printf("stored: %llu tokens are known now, %llu pages copied, %llu were known\n",
         (unsigned long long)job.usable_tokens, (unsigned long long)job.moved_pages,
         (unsigned long long)job.known_pages);

  if (!RunJob(engine, true, others, &job)) return 1;
  uint64_t wrong = 0;
  for (uint64_t layer = 0; layer < engine->layers; ++layer) {
    for (int kind = 0; kind < 2; ++kind) {
      for (size_t token = 0; token < job.usable_tokens; ++token) {
        wrong += memcmp(RowAt(engine, layer, kind, blocks, token),
                        RowAt(engine, layer, kind, others, token), RowBytes(engine)) != 0;
      }
    }
  }
  printf("loaded again: %llu tokens, %llu wrong rows\n", (unsigned long long)job.usable_tokens,
         (unsigned long long)wrong);
  return wrong == 0 ? 0 : 1;
}

static bool ReadTokens(const char* text, struct Engine* engine) {
  while (*text != '\0' && engine->num_tokens < kMaxTokens) {
    char* end = NULL;
    engine->tokens[engine->num_tokens++] = (uint32_t)strtoul(text, &end, 10);
    if (end == text) return false;
    text = *end == ',' ? end + 1 : end;
    if (*end != ',' && *end != '\0') return false;
  }
  return engine->num_tokens > 0 && *text == '\0';
}

int main(int count, char** arguments) {
  static struct Engine engine;
  if (count != 9 || !ReadTokens(arguments[8], &engine)) {
    fprintf(stderr, "usage: %s WORKER SOCKET MODEL LAYERS HEADS HEAD_BYTES TYPE TOKENS\n",
            arguments[0]);
    return 2;
  }
  engine.layers = strtoull(arguments[4], NULL, 10);
  engine.heads = strtoull(arguments[5], NULL, 10);
  engine.head_bytes = strtoull(arguments[6], NULL, 10);
  engine.num_blocks = (uint32_t)(1 + 2 * ((engine.num_tokens + kBlockTokens - 1) / kBlockTokens));
  snprintf(engine.name, sizeof(engine.name), "c-example");
  const uint64_t num_bytes = PlaneOffset(&engine, engine.layers, 0);
  const int fd = num_bytes == 0 ? -1 : pt_make_memory(num_bytes, &engine.memory);
  if (fd < 0) {
    fprintf(stderr, "memory of %llu bytes: %s\n", (unsigned long long)num_bytes, strerror(errno));
    return 1;
  }
  char error[512];
  struct pt_plane plane;
  if (!pt_plane_connect(&plane, arguments[2], "", fd, num_bytes, error, sizeof(error))) {
    fprintf(stderr, "%s\n", error);
    return 1;
  }
  int code = 1;
  engine.worker = pt_worker_connect(arguments[1]);
  if (engine.worker != NULL &&
      Register(&engine, plane.client_id, arguments[3], strtoull(arguments[7], NULL, 10))) {
    code = Serve(&engine);
    struct pt_message request = {0};
    PutRef(&request, 1, &engine);
    /* When it has answered no job touches the memory any more. The end of the plane's connection
     * would do as well. */
    if (!Call(&engine, "/pagetide.v1.EnginePoolService/UnregisterEnginePool", &request, Ignore,
              NULL))
      code = 1;
  }
  if (engine.worker != NULL) pt_worker_close(engine.worker);
  pt_plane_close(&plane);
  return code;
}
