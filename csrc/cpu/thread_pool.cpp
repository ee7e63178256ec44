#include "cpu/thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gut_fast::cpu {
namespace {

// Chunks that lie side by side. Each participant has a share of them, goes through it in order, as what it fetches
// ahead is of the chunk that follows, and then helps with what others have left.
struct Share {
  std::atomic<std::int64_t> next{0};
  std::int64_t end = 0;

  bool is_left() const { return next.load(std::memory_order_relaxed) < end; }
};

struct Job {
  ChunkBody body;
  void* context;
  std::vector<Share> shares;
  std::fenv_t float_modes;
  int participants = 1;  // the caller; guarded by the pool's mutex, as is `active`
  int active = 0;        // workers inside work()

  Job(int max_participants, std::int64_t num_chunks, ChunkBody body, void* context)
      : body(body), context(context), shares(max_participants) {
    for (int i = 0; i < max_participants; ++i) {
      shares[i].next = num_chunks * i / max_participants;
      shares[i].end = num_chunks * (i + 1) / max_participants;
    }
  }

  void work(int participant) {
    for (std::size_t i = 0; i < shares.size(); ++i) {
      Share& share = shares[(participant + i) % shares.size()];
      while (share.is_left()) {
        const auto chunk = share.next.fetch_add(1, std::memory_order_relaxed);
        if (chunk < share.end) body(context, chunk, participant);
      }
    }
  }
};

// In a training loop the cores are not idle when a step begins: OpenMP's threads, which the backward pass has left,
// spin there for milliseconds. A worker that shall run at once asks for short slices of time (Linux 6.12 and later, no
// privilege needed: it gets no more time by it, only sooner), and is kept off the caller's core, where it would wait
// for the caller.
void ask_for_short_slices() {
#if defined(__linux__) && defined(SYS_sched_setattr)
  struct {
    std::uint32_t size, policy = 0;
    std::uint64_t flags = 0;
    std::int32_t nice = 0;
    std::uint32_t priority = 0;
    std::uint64_t slice = 100'000;  // ns, the least the system grants
    std::uint64_t deadline = 0, period = 0;
  } attributes;
  attributes.size = sizeof attributes;
  attributes.nice = getpriority(PRIO_PROCESS, 0);
  if (sched_getscheduler(0) == SCHED_OTHER) syscall(SYS_sched_setattr, 0, &attributes, 0);
#endif
}

class ThreadPool {
 public:
  void run(Job& job) {
    std::unique_lock caller(one_caller_, std::try_to_lock);
    if (!caller.owns_lock()) return job.work(0);
    {
      std::lock_guard lock(mutex_);
      start_workers(static_cast<int>(job.shares.size()) - 1);
      job_ = &job;
      ++generation_;
    }
    keep_off_this_core();
    wake_.notify_all();
    job.work(0);
    std::unique_lock lock(mutex_);
    job_ = nullptr;
    done_.wait(lock, [&] { return job.active == 0; });
  }

 private:
  void start_workers(int wanted) {
    while (static_cast<int>(workers_.size()) < wanted) {
      try {
        std::thread worker([this] { serve(); });
        workers_.push_back(worker.native_handle());
        worker.detach();
        avoided_core_ = -1;
      } catch (const std::system_error&) {
        return;  // no more threads to be had: those there are, and the caller, do the work
      }
    }
  }

  void keep_off_this_core() {
#if defined(__linux__)
    const int core = sched_getcpu();
    if (core == avoided_core_) return;
    avoided_core_ = core;
    cpu_set_t cores;
    if (sched_getaffinity(0, sizeof cores, &cores) != 0) return;
    if (CPU_COUNT(&cores) > 1) CPU_CLR(core, &cores);
    for (const auto worker : workers_) pthread_setaffinity_np(worker, sizeof cores, &cores);
#endif
  }

  void serve() {
    ask_for_short_slices();
    std::uint64_t joined = 0;  // the last generation of jobs this worker took part in
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != joined && joinable(); });
      Job& job = *job_;
      joined = generation_;
      const int participant = job.participants++;
      ++job.active;
      lock.unlock();
      std::fesetenv(&job.float_modes);
      job.work(participant);
      lock.lock();
      if (--job.active == 0) done_.notify_one();
    }
  }

  bool joinable() const {
    return job_ != nullptr && job_->participants < static_cast<int>(job_->shares.size()) &&
           std::any_of(job_->shares.begin(), job_->shares.end(), [](const Share& share) { return share.is_left(); });
  }

  std::mutex one_caller_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  std::uint64_t generation_ = 0;
  std::vector<std::thread::native_handle_type> workers_;
  int avoided_core_ = -1;
};

// Never destroyed: its workers sleep until the process ends. A forked child has none of them and starts afresh.
std::atomic<ThreadPool*> pool{nullptr};

ThreadPool& the_pool() {
  static const bool registered = [] {
    pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
    return true;
  }();
  static_cast<void>(registered);
  ThreadPool* current = pool.load();
  if (current == nullptr) {
    auto* fresh = new ThreadPool;
    if (pool.compare_exchange_strong(current, fresh)) return *fresh;
    delete fresh;
  }
  return *current;
}

}  // namespace

void parallel_chunks(int num_threads, std::int64_t num_chunks, ChunkBody body, void* context) {
  const auto participants = std::max<std::int64_t>(std::min<std::int64_t>(num_threads, num_chunks), 1);
  Job job(static_cast<int>(participants), num_chunks, body, context);
  if (participants == 1) return job.work(0);
  std::fegetenv(&job.float_modes);
  the_pool().run(job);
}

}  // namespace gut_fast::cpu
