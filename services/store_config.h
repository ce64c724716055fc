// From a StoreConfig (file and flags merged) to the options of a page store's program. Stateless.
#ifndef PAGETIDE_SERVICES_STORE_CONFIG_H_
#define PAGETIDE_SERVICES_STORE_CONFIG_H_

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kvstore/rocksdb_page_store.h"
#include "pagetide/config/store.pb.h"
#include "rpc/server.h"
#include "services/page_store_service.h"

namespace pagetide {

struct StoreOptions {
  RocksdbPageStoreOptions engine;
  PageStoreServiceImpl::Options service;
  RpcServer::Options server;
  absl::Duration drain_timeout = absl::Seconds(30);
};

// `flags` over `file`: a field that a flag set wins, a list given by flags replaces the file's.
config::StoreConfig MergeStoreConfig(const config::StoreConfig& file,
                                     const config::StoreConfig& flags);
// INVALID_ARGUMENT names the field.
absl::StatusOr<StoreOptions> StoreOptionsFromConfig(const config::StoreConfig& config);

}  // namespace pagetide

#endif  // PAGETIDE_SERVICES_STORE_CONFIG_H_
