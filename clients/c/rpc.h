/* Calls of a worker's gRPC services through gRPC's own C library. For one thread. */
#ifndef PAGETIDE_CLIENTS_C_RPC_H_
#define PAGETIDE_CLIENTS_C_RPC_H_

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "clients/c/wire.h"

struct pt_worker; /* a connection */
/* `address`: "host:port" without TLS. */
struct pt_worker* pt_worker_connect(const char* address);
void pt_worker_close(struct pt_worker* worker);

/* Told of each message of an answer, which is gone afterwards. */
typedef void (*pt_on_message)(void* context, const uint8_t* data, size_t size);
/* One call, unary or of a stream of answers, until its end or for so many seconds. `method` as in
 * "/pagetide.v1.EnginePoolService/LoadPages". False: `error` has the code and the server's words.
 */
bool pt_call(struct pt_worker* worker, const char* method, const struct pt_message* request,
             unsigned seconds, pt_on_message on_message, void* context, char* error,
             size_t error_size);

#endif /* PAGETIDE_CLIENTS_C_RPC_H_ */
