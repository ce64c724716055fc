// OracleJournal: the witness outside the system. Before a write it notes the intent, after the
// acknowledgement it notes that, each fsynced; the verdict after a crash is read from its file
// alone. Thread-safe.
#ifndef PAGETIDE_TESTS_FAULT_ORACLE_JOURNAL_H_
#define PAGETIDE_TESTS_FAULT_ORACLE_JOURNAL_H_

#include <cstdint>
#include <map>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "base/mutex.h"
#include "tests/contract/test_page.h"

namespace pagetide {

class OracleJournal {
 public:
  struct Entry {
    uint64_t bytes = 0;
    Checksum128 checksum;
    bool acked = false;
  };
  struct Verdict {
    std::map<uint64_t, Entry> pages;                         // by seed of MakeTestPage
    std::map<std::string, std::vector<uint64_t>> manifests;  // acknowledged: name → page seeds
  };

  explicit OracleJournal(const std::string& path);
  ~OracleJournal();
  OracleJournal(const OracleJournal&) = delete;
  OracleJournal& operator=(const OracleJournal&) = delete;

  void Intend(std::span<const TestPage> pages, std::span<const uint64_t> seeds);
  void Acknowledge(std::span<const uint64_t> seeds);
  void AcknowledgeManifest(const std::string& name, std::span<const uint64_t> seeds);

  // Reads the file from its beginning.
  Verdict Read() const;

 private:
  void AppendSynced(const std::string& lines);

  const std::string path_;
  const int fd_;
  Mutex mu_;  // held during the write: lines stay whole
};

// What a campaign found; also its one line of JSON.
struct CampaignResult {
  int kills = 0;
  int kills_in_flight = 0;  // with writes in flight
  uint64_t acked = 0;
  uint64_t lost = 0;
  uint64_t wrong = 0;
  uint64_t bytes_verified = 0;
  uint64_t manifests_acked = 0;
  uint64_t manifests_lost = 0;
  uint64_t unacked_found = 0;  // neither promised nor forbidden; verified all the same
  std::vector<double> recovery_seconds;
  uint64_t seed = 0;

  std::string ToJson(const std::string& campaign) const;
};

// Reads everything that the journal says was intended or acknowledged from the store and compares
// it, byte for byte, with what the seeds give. Adds to `result`.
void VerifyAgainstJournal(const OracleJournal::Verdict& verdict, PageStore* store,
                          CampaignResult* result);

}  // namespace pagetide

#endif  // PAGETIDE_TESTS_FAULT_ORACLE_JOURNAL_H_
