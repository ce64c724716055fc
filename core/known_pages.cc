#include "core/known_pages.h"

#include <algorithm>
#include <iterator>

namespace pagetide {

void KnownPages::Add(PageId id, absl::string_view tenant) {
  const auto [it, is_new] = places_.try_emplace(id);
  if (!is_new) return;
  auto& node = *by_tenant_.try_emplace(tenant).first;
  it->second = {&node, node.second.insert(node.second.end(), id)};
}

void KnownPages::Touch(PageId id) {
  const auto it = places_.find(id);
  if (it == places_.end()) return;
  Order& order = it->second.tenant->second;
  order.splice(order.end(), order, it->second.at);
}

void KnownPages::Remove(PageId id) {
  const auto it = places_.find(id);
  if (it == places_.end()) return;
  auto* const tenant = it->second.tenant;
  tenant->second.erase(it->second.at);
  if (tenant->second.empty()) by_tenant_.erase(tenant->first);
  places_.erase(it);
}

std::vector<PageId> KnownPages::TakeExcess(size_t max) {
  std::vector<PageId> taken;
  while (size() > max) {
    const Order* most = nullptr;
    size_t second = 0;
    for (const auto& [tenant, order] : by_tenant_) {
      if (most == nullptr || order.size() > most->size()) {
        if (most != nullptr) second = most->size();
        most = &order;
      } else {
        second = std::max(second, order.size());
      }
    }
    // Down to what the next has, and then both in turn.
    const size_t count = std::min(size() - max, std::max<size_t>(1, most->size() - second));
    const auto first = static_cast<std::ptrdiff_t>(taken.size());
    std::copy_n(most->begin(), count, std::back_inserter(taken));
    std::for_each(taken.begin() + first, taken.end(), [this](PageId id) { Remove(id); });
  }
  return taken;
}

}  // namespace pagetide
