// Request ids: unique over all processes, so that a retried call is told from a new one.
#ifndef PAGETIDE_CLIENTS_CPP_REQUEST_ID_H_
#define PAGETIDE_CLIENTS_CPP_REQUEST_ID_H_

#include <string>

namespace pagetide {

// 128 random bits in hex. Thread-safe.
std::string NewRequestId();

}  // namespace pagetide

#endif  // PAGETIDE_CLIENTS_CPP_REQUEST_ID_H_
