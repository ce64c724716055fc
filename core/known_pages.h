// KnownPages: the pages that only the store has and nobody references, which a host remembers so
// that prompts find them without asking the store, and in which order it forgets them. Each tenant
// has an order of its own: of more than there may be, the tenant with most of them gives up those
// that were used longest ago, so that nobody's prompts make a host forget what others asked for.
// Holds ids, not references. Not thread-safe.
#ifndef PAGETIDE_CORE_KNOWN_PAGES_H_
#define PAGETIDE_CORE_KNOWN_PAGES_H_

#include <cstddef>
#include <list>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/node_hash_map.h"
#include "absl/strings/string_view.h"
#include "core/ids.h"

namespace pagetide {

class KnownPages {
 public:
  // As used just now. A page that is there already keeps its place.
  void Add(PageId id, absl::string_view tenant);
  // Nothing, if it is not there.
  void Touch(PageId id);
  void Remove(PageId id);
  // Removes and returns what is there beyond `max` pages.
  std::vector<PageId> TakeExcess(size_t max);

  size_t size() const { return places_.size(); }
  bool Contains(PageId id) const { return places_.contains(id); }

 private:
  using Order = std::list<PageId>;  // used longest ago first
  struct Place {
    // Nodes of by_tenant_ stay where they are.
    absl::node_hash_map<std::string, Order>::pointer tenant;
    Order::iterator at;
  };
  absl::node_hash_map<std::string, Order> by_tenant_;  // none is empty
  absl::flat_hash_map<PageId, Place> places_;
};

}  // namespace pagetide

#endif  // PAGETIDE_CORE_KNOWN_PAGES_H_
