#include "worker/shard_peers.h"

#include "rpc/channel.h"

namespace pagetide {

ShardPeer::ShardPeer(const std::string& address) {
  const std::shared_ptr<grpc::Channel> channel = MakeChannel(address);
  prefixes = v1::PrefixService::NewStub(channel);
  sequences = v1::SequenceService::NewStub(channel);
  edits = v1::SequenceEditService::NewStub(channel);
  groups = v1::ShardGroupService::NewStub(channel);
}

std::shared_ptr<ShardPeer> ShardPeers::At(const std::string& address) {
  // Given up outside of the lock: the end of a channel may close its connection.
  std::shared_ptr<ShardPeer> given_up;
  MutexLock lock(&mu_);
  if (const auto it = peers_.find(address); it != peers_.end()) {
    by_use_.splice(by_use_.end(), by_use_, it->second);
    return it->second->second;
  }
  if (peers_.size() >= max_peers_) {
    given_up = std::move(by_use_.front().second);
    peers_.erase(by_use_.front().first);
    by_use_.pop_front();
  }
  const auto at = by_use_.emplace(by_use_.end(), address, std::make_shared<ShardPeer>(address));
  peers_.emplace(address, at);
  return at->second;
}

size_t ShardPeers::size() const {
  MutexLock lock(&mu_);
  return peers_.size();
}

}  // namespace pagetide
