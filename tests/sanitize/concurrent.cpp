// Steps taken by several threads at once, then in forked children: each equals the step of a thread alone, bit for bit.
//
//   concurrent STEPS FORKS
//
// Built with a sanitizer it also shows races, and memory that is not the step's. Exit code 1 if a number differs.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "cpu/kernel.h"
#include "gossip_step.h"

using namespace gut_fast;

namespace {

// GUT on a ring, with numbers that follow from the seed; the second half of the columns is a segment of its own.
class Problem {
 public:
  Problem(std::int64_t num_agents, std::int64_t columns, unsigned seed)
      : n_(num_agents), columns_{columns, columns / 3 + 1} {
    const auto size = n_ * (columns_[0] + columns_[1]);
    for (auto* numbers : {&parameters, &state, &gradients_}) {
      for (std::int64_t i = 0; i < size; ++i) {
        seed = seed * 1664525u + 1013904223u;
        numbers->push_back(static_cast<float>(seed >> 8) / (1 << 24));
      }
    }
    for (std::int64_t i = 0; i < n_; ++i) {
      row_start_.push_back(2 * i);
      for (const auto other : {(i + n_ - 1) % n_, (i + 1) % n_}) neighbor_.push_back(other);
    }
    row_start_.push_back(2 * n_);
    weight_.assign(2 * n_, 1.0 / 3);
  }

  void step(int num_threads) {
    void* states[] = {state.data()};
    std::vector<Segment> segments;
    std::int64_t offset = 0;
    for (const auto count : columns_) {
      segments.push_back({parameters.data() + offset, gradients_.data() + offset, count, offset});
      offset += n_ * count;
    }
    cpu::gossip_step({DType::float32,
                      DType::float32,
                      1,
                      1,
                      coefficients_,
                      {n_, 2 * n_, row_start_.data(), neighbor_.data(), weight_.data()},
                      nullptr,
                      states,
                      segments.data(),
                      static_cast<std::int64_t>(segments.size())},
                     num_threads);
  }

  bool operator==(const Problem& other) const { return parameters == other.parameters && state == other.state; }

  std::vector<float> parameters, state;

 private:
  // S = z - eta (g + mu r);  z' = S + D;  r' = mu r - D / eta, of eta = 0.1, mu = 0.5
  static constexpr double coefficients_[] = {1, -0.05, -0.1, 0, 0, 0, 0, 0.5, 0, 1, 0, 1, -10};
  std::int64_t n_, columns_[2];
  std::vector<float> gradients_;
  std::vector<std::int64_t> row_start_, neighbor_;
  std::vector<double> weight_;
};

bool agrees(unsigned seed, int steps) {
  Problem alone(5 + seed % 7, 3000 + 517 * (seed % 5), seed), shared = alone;
  for (int step = 0; step < steps; ++step) {
    alone.step(1);
    shared.step(2 + step % 3);
  }
  return alone == shared;
}

bool forked_agrees(unsigned seed) {
  const auto child = fork();
  if (child == 0) _exit(agrees(seed, 3) ? 0 : 1);
  int status = 1;
  return child > 0 && waitpid(child, &status, 0) == child && status == 0;
}

}  // namespace

int main(int count, char** arguments) {
  const int steps = count > 1 ? std::atoi(arguments[1]) : 200, forks = count > 2 ? std::atoi(arguments[2]) : 20;
  int wrong = 0;
  std::vector<std::thread> threads;
  std::vector<char> right(4);
  for (unsigned i = 0; i < right.size(); ++i) threads.emplace_back([&, i] { right[i] = agrees(i, steps); });
  for (auto& thread : threads) thread.join();
  for (const bool each : right) wrong += !each;
  // Afterwards, when the pool's workers sleep: a sanitizer's own allocator is not made for a fork beside busy threads.
  for (int i = 0; i < forks; ++i) wrong += !forked_agrees(100 + i);
  std::printf("%d steps beside each other in %zu threads, %d forks: %d differ\n", steps, right.size(), forks, wrong);
  return wrong != 0;
}
