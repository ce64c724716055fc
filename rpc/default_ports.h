// The ports of loopback where the programs of one machine listen, and where clients look for them,
// unless they are told otherwise. 0 is any free port.
#ifndef PAGETIDE_RPC_DEFAULT_PORTS_H_
#define PAGETIDE_RPC_DEFAULT_PORTS_H_

#include <string>

#include "absl/strings/str_cat.h"

namespace pagetide {

inline constexpr int kDefaultRouterPort = 7070;
// Of the first of several workers in one process; the others follow. pagetide-worker itself takes
// any free port: it tells routers which.
inline constexpr int kDefaultWorkerPort = 7080;
inline constexpr int kDefaultStorePort = 7090;

inline std::string LoopbackAddress(int port) {
  return absl::StrCat("127.0.0.1:", port);
}

}  // namespace pagetide

#endif  // PAGETIDE_RPC_DEFAULT_PORTS_H_
