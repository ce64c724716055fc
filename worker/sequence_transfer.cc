#include "worker/sequence_transfer.h"

#include "absl/strings/str_cat.h"

namespace pagetide {

Digest ProveTransfer(const TransferPlan& plan, absl::string_view state, const TenantSalt& salt) {
  Sha256 hash;
  hash.AppendField(state).AppendU32(static_cast<uint32_t>(plan.kind));
  hash.AppendField(plan.kind == TransferKind::kMove ? plan.identity.id.ToString() : "");
  hash.AppendU64(plan.kind == TransferKind::kMove ? plan.identity.epoch : 0);
  hash.AppendU64(plan.pages.size());
  for (const TransferPage& page : plan.pages) {
    hash.AppendField(page.ref.key.digest.view());
    hash.AppendU64(page.ref.checksum.low).AppendU64(page.ref.checksum.high);
    hash.AppendU32(page.rows).AppendU32(page.is_full ? 1 : 0);
  }
  return HmacSha256(salt.digest.view(), absl::StrCat("pagetide.transfer.v1", hash.Finish().view()));
}

}  // namespace pagetide
