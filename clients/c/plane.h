/* The local plane of a worker on this host (proto/pagetide/v1/local_plane.proto): a unix socket
 * over which memory is handed over. The connection is this client's life to the worker. For one
 * thread. */
#ifndef PAGETIDE_CLIENTS_C_PLANE_H_
#define PAGETIDE_CLIENTS_C_PLANE_H_

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* LocalMemory.Kind. A GPU's memory is for its owner's libraries to map: this client does not ask
 * for it, and is given none. */
enum pt_memory_kind {
  PT_MEMORY_NONE = 0,
  PT_MEMORY_MEMFD = 1,
  PT_MEMORY_CUDA_VMM = 2,
  PT_MEMORY_CUDA_IPC = 3
};

struct pt_plane {
  int socket;
  uint64_t client_id;
  /* The frames of the model that was asked for, mapped read-only; null when they lie in memory that
   * this client does not map. */
  const uint8_t* pool;
  uint64_t pool_bytes;
  enum pt_memory_kind pool_kind; /* of the frames, mapped or not */
  char why_no_pool[256];         /* the worker's words where pool is null; empty if it told none */
};

/* Says hello and reads the welcome. `model_digest` (64 hex digits): whose pool is to be mapped;
 * empty for none. `memory_fd`: a memfd of this process to hand over, of memory_bytes; -1 for none.
 * It stays the caller's. The worker waits for nobody: neither does this, longer than 10 s. False:
 * `error` says why, and there is nothing to close. */
bool pt_plane_connect(struct pt_plane* plane, const char* socket_path, const char* model_digest,
                      int memory_fd, uint64_t memory_bytes, char* error, size_t error_size);
/* The worker ends what stands on memory that was handed over. */
void pt_plane_close(struct pt_plane* plane);

/* Memory that can be handed over: a memfd, all allocated, sealed against shrinking. Mapped at *data
 * for reading and writing. Its descriptor, or -1 with errno. */
int pt_make_memory(uint64_t num_bytes, uint8_t** data);

#endif /* PAGETIDE_CLIENTS_C_PLANE_H_ */
